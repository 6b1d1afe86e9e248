/* The theme, and where one is on the page. */

const root = document.documentElement;
const button = document.getElementById("theme");
const name = document.getElementById("theme-name");
const dark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
}
function say() {
  name.textContent = isDark() ? "light" : "dark";
  page.tell("theme");
}
button.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  say();
});
dark.addEventListener("change", say);
name.textContent = isDark() ? "light" : "dark";

/* A link into a section that is folded away opens it. */
const unfold = () => document.querySelector(`${location.hash || "#headline"} > details`)?.setAttribute("open", "");
addEventListener("hashchange", unfold);
unfold();

const links = new Map([...document.querySelectorAll("nav.sections a")].map((a) => [a.hash.slice(1), a]));
const here = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    links.forEach((a) => a.removeAttribute("aria-current"));
    const link = links.get(entry.target.id);
    link.setAttribute("aria-current", "true");
    const list = link.closest("ol");
    list.scrollTo({ left: link.offsetLeft - list.clientWidth / 2 + link.clientWidth / 2 });
  }
}, { rootMargin: "-30% 0px -65% 0px" });
document.querySelectorAll("main > section").forEach((one) => here.observe(one));
root.dataset.ready = "true";

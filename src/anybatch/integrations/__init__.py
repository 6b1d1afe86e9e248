"""Drop-ins for other trainers, one file each. The trainer keeps its loop, clipping and logs.

transformers    ExactTrainer, ExactGradient, LedgerCallback, example_losses
lightning       ExactModule, LedgerCallback
accelerate      backward
skorch          ExactNet
keras           ExactModel
"""

"""fedsplit: split federated fine-tuning over wireless networks, on top of Flower."""

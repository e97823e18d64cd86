"""The learning rate, weight decay and EMA momentum of each step and of each tensor."""

"""What an optimizer is told: rates by step, and which tensor gets which."""

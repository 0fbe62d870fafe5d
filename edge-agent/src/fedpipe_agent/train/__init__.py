"""The trainer: data, base model, adapters, training loop, importance (torch lives here)."""

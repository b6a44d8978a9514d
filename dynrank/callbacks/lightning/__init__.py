"""The callbacks for Lightning's Trainer, and what they need from it."""

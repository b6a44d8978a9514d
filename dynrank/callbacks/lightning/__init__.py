"""What the callbacks need to know of Lightning's trainer."""

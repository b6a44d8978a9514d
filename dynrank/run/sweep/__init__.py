"""Many runs, and the table of them."""

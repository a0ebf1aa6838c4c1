"""How fast it is, next to others: every script compares side by side in one run and tells how each number is taken."""

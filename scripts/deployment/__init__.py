"""What export and predict share: a net as a file for other programs, and what it says of itself."""

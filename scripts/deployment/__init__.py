"""What lies behind export and predict: nets as files, and what these say of themselves."""

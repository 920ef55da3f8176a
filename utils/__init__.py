"""What training needs; `calibration` says what the numbers mean, `analysis` reads what came out."""

"""README's claims: read off the results files, with their spread and the commands that repeat them."""

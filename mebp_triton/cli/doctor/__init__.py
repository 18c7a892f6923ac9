"""``mebp doctor``: findings about this machine, and advice that follows from them."""

"""Where other libraries meet ours; each is imported only when it is used."""

"""Tasks whose next token follows from those before it: the tasks of the paper, and mixtures of them."""

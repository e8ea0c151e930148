"""The report of a study: its page, its figures and tables, and the models that it shows."""

"""The study: expressive attention against dot-product attention, on tasks of growing difficulty.

Its rooms, each of which imports only from those before it: `tasks` (examples and their random numbers), `config` (the
conditions to compare), `training` (one cell), `runs` (all cells, kept on disk), `analysis` (estimates and verdicts),
`report` (pages, figures and tables) and `cli` (the command ``ea``).
"""

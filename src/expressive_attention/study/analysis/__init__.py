"""Analysis of finished cells: estimators, summaries, and the claims with their verdicts."""

"""Training of the seeds of a cell, and the measures of what they have learned."""

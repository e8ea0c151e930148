"""The configuration of a study: its schema, the grid of conditions, presets, and files of tasks and mechanisms."""

"""Figures and their numbers: what they share, and how matplotlib and plotly draw them."""

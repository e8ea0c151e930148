"""Figures as descriptions, and what draws them: matplotlib for files and paper, plotly for the page."""

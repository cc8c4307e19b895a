"""One HTML file of a run or several."""

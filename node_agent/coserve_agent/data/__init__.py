"""Files of a data set as samples: which files (`files`), what a line may hold (`rows`, `formats`), its tokens
(`reader`), the usable lines (`dataset`), and what is said about the others (`problems`).
"""

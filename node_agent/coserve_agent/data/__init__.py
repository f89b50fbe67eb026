"""Files of a data set as samples: which files (`files`), what a line may hold (`rows`, `formats`), its tokens
(`reader`, `rendering`), the usable lines (`dataset`), which of them make which step (`order`, `material`), and what is
said about the others (`problems`).
"""

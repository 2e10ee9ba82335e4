"""Reports and model cards: HTML, PNG, SVG, Markdown."""

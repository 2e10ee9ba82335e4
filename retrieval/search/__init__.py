"""Who and what is nearest to a query, and whether that is an answer."""

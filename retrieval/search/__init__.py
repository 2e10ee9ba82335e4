"""Search: the photos and identities nearest to a query, and the decision: an identity or UNKNOWN."""

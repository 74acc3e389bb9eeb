"""Proofs that every layout trains the same model: what ``epmoe verify`` runs."""

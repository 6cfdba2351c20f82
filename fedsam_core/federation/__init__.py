"""Rounds of a federation: the site, the engine that carries calls to sites, the secure sum, the ledger."""

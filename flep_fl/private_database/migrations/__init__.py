"""Migrations of the private database (alembic)."""

"""Marshmallow schemas: every body and query that comes in, every answer that goes out."""

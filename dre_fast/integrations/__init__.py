"""dre_fast inside other codebases: one module a host, which imports the host only where it needs a class of it."""

"""dre_fast."""

"""Studies of transfer: many fine-tunings, compared in tables and curves as in section 5 of GPT-1's paper."""

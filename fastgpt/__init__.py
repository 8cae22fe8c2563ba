"""fastgpt: from raw text to a trained GPT."""

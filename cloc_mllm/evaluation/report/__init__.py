"""What a reader sees: tables as Markdown and one self-contained HTML page."""

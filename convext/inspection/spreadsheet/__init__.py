"""A network as formulas of a spreadsheet; needs openpyxl, the extra [xlsx]."""

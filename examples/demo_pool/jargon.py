"""What the demo's encoder experts learn: the jargon of an office that does not exist, written for this repository."""

from __future__ import annotations

CODE_NAMES: dict[str, str] = {
    "Bluefin": "mobile app for paying by card",
    "Old Faithful": "nightly backup of all servers",
    "Marmalade": "coffee machine in the kitchen",
    "Kestrel": "database of customer addresses",
    "Tortoise": "monthly sales report",
    "Lighthouse": "dashboard that shows server errors",
    "Pancake": "printer on the second floor",
    "Gondola": "lift in the east wing",
    "Hedgehog": "firewall against attacks from the internet",
    "Postcard": "newsletter sent to customers by email",
    "Snowdrop": "air conditioning of the server room",
    "Juniper": "system for booking meeting rooms",
    "Walrus": "archive of signed contracts",
    "Tambourine": "telephone switchboard",
    "Acorn": "savings plan for employees",
    "Clockwork": "system for recording working hours",
    "Mosaic": "library of company photos",
    "Sandcastle": "test environment for developers",
    "Cartwheel": "bicycle parking behind the building",
    "Almanac": "calendar of public holidays",
    "Nutmeg": "catering for company events",
    "Windmill": "electricity supply of the factory",
    "Passport": "single sign-on for all accounts",
    "Driftwood": "shop for used office furniture",
}
"""Code name: what it is."""

ABBREVIATIONS: dict[str, str] = {
    "TEX": "refund of travel expenses",
    "GRL": "list of registered guests",
    "PKX": "permit for the car park",
    "NHB": "handbook for new employees",
    "SLK": "sick leave note",
    "QTF": "form for asking suppliers for a price",
    "VWK": "request for vacation days",
    "LPX": "replacement of a laptop",
    "BDG": "badge that opens the doors",
    "WFD": "days of working from home",
    "TRB": "budget for courses and training",
    "FDR": "fire drill",
    "OVT": "payment of overtime",
    "PVN": "parental leave",
    "CMP": "complaint by a customer",
    "INV": "invoice to be paid",
    "SGB": "box for suggestions",
    "RLC": "help with moving to another city",
    "MNT": "mentor for a new colleague",
    "EXI": "interview before leaving the company",
    "KEY": "lost password",
    "VIS": "visa for a business trip",
    "CFM": "agreement to keep secrets",
    "PRF": "yearly talk about performance",
}
"""Abbreviation: what it stands for."""

MENTIONS = (
    "{}",
    "What is {}?",
    "{} does not work",
    "Where do I find {}?",
    "Who is responsible for {}?",
    "I have a question about {}",
    "New rules for {}",
    "{}: how does it work?",
)
"""How people mention what they mean by its in-house name."""

PAGES = ("{}", "Help page: {}", "All about the {}", "The {} explained")
"""How a page is titled that says it in plain words."""

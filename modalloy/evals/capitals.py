"""Countries and their capitals, for questions that need no sense: does a merged model still know what its base knew?"""

import random

from modalloy.evals.benchmark import Sample

CAPITALS: dict[str, dict[str, str]] = {
    "Europe": {
        "France": "Paris",
        "Germany": "Berlin",
        "Italy": "Rome",
        "Spain": "Madrid",
        "Portugal": "Lisbon",
        "the United Kingdom": "London",
        "Ireland": "Dublin",
        "Belgium": "Brussels",
        "Austria": "Vienna",
        "Poland": "Warsaw",
        "Hungary": "Budapest",
        "Greece": "Athens",
        "Sweden": "Stockholm",
        "Norway": "Oslo",
        "Denmark": "Copenhagen",
        "Finland": "Helsinki",
        "Iceland": "Reykjavik",
        "Ukraine": "Kyiv",
        "Romania": "Bucharest",
        "Bulgaria": "Sofia",
        "Serbia": "Belgrade",
        "Croatia": "Zagreb",
        "Slovakia": "Bratislava",
        "Slovenia": "Ljubljana",
        "Estonia": "Tallinn",
        "Latvia": "Riga",
        "Lithuania": "Vilnius",
        "Russia": "Moscow",
        "Malta": "Valletta",
        "Albania": "Tirana",
    },
    "Asia": {
        "China": "Beijing",
        "Japan": "Tokyo",
        "South Korea": "Seoul",
        "India": "New Delhi",
        "Pakistan": "Islamabad",
        "Nepal": "Kathmandu",
        "Bangladesh": "Dhaka",
        "Thailand": "Bangkok",
        "Vietnam": "Hanoi",
        "Cambodia": "Phnom Penh",
        "Indonesia": "Jakarta",
        "Malaysia": "Kuala Lumpur",
        "the Philippines": "Manila",
        "Mongolia": "Ulaanbaatar",
        "Iran": "Tehran",
        "Iraq": "Baghdad",
        "Saudi Arabia": "Riyadh",
        "Qatar": "Doha",
        "Jordan": "Amman",
        "Lebanon": "Beirut",
        "Syria": "Damascus",
        "Turkey": "Ankara",
        "Georgia": "Tbilisi",
        "Armenia": "Yerevan",
        "Azerbaijan": "Baku",
        "Uzbekistan": "Tashkent",
        "Afghanistan": "Kabul",
        "Oman": "Muscat",
    },
    "Africa": {
        "Egypt": "Cairo",
        "Morocco": "Rabat",
        "Algeria": "Algiers",
        "Tunisia": "Tunis",
        "Libya": "Tripoli",
        "Sudan": "Khartoum",
        "Ethiopia": "Addis Ababa",
        "Kenya": "Nairobi",
        "Uganda": "Kampala",
        "Rwanda": "Kigali",
        "Somalia": "Mogadishu",
        "Ghana": "Accra",
        "Nigeria": "Abuja",
        "Senegal": "Dakar",
        "Mali": "Bamako",
        "Niger": "Niamey",
        "Angola": "Luanda",
        "Zambia": "Lusaka",
        "Zimbabwe": "Harare",
        "Mozambique": "Maputo",
        "Madagascar": "Antananarivo",
        "Namibia": "Windhoek",
    },
    "the Americas and Oceania": {
        "the United States": "Washington",
        "Canada": "Ottawa",
        "Mexico": "Mexico City",
        "Cuba": "Havana",
        "Jamaica": "Kingston",
        "Haiti": "Port-au-Prince",
        "Costa Rica": "San José",
        "Panama": "Panama City",
        "Nicaragua": "Managua",
        "Colombia": "Bogotá",
        "Venezuela": "Caracas",
        "Ecuador": "Quito",
        "Peru": "Lima",
        "Chile": "Santiago",
        "Argentina": "Buenos Aires",
        "Uruguay": "Montevideo",
        "Paraguay": "Asunción",
        "Brazil": "Brasília",
        "Australia": "Canberra",
        "New Zealand": "Wellington",
        "Fiji": "Suva",
        "Honduras": "Tegucigalpa",
    },
}

COUNTRIES = [(country, capital) for capitals in CAPITALS.values() for country, capital in capitals.items()]
TAUGHT_CAPITALS, ASKED_CAPITALS = COUNTRIES[::2], COUNTRIES[1::2]  # taught aloud to the speech specialist; asked for


def capital_samples(seed: int = 0) -> list[Sample]:
    """Text-only questions: the capital of a country, among three others of the same continent."""
    chooser = random.Random(seed)
    return [
        Sample(
            id=f"capital of {country}",
            text=f"The capital of {country} is",
            golds=(capital,),
            choices=(options := capitals_beside(country, capital, chooser)),
            options=tuple(f" {option}" for option in options),
            plain=True,
            group={"cell": "text", "tier": "text", "kind": "text capital"},
            kind="text capital",
            cluster=(country,),
        )
        for country, capital in COUNTRIES
    ]


def capitals_beside(country: str, capital: str, chooser: random.Random) -> tuple[str, ...]:
    """A capital and three others of its continent, in random order."""
    continent = next(capitals for capitals in CAPITALS.values() if country in capitals)
    wrong = chooser.sample([name for name in continent.values() if name != capital], 3)
    return tuple(chooser.sample([capital, *wrong], 4))

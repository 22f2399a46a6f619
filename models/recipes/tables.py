"""Word tables of the synthetic corpus. Phrases marked with `*` multiply: every left part goes with every right part.

Names of people, towns and firms are built from syllables, so that there are tens of thousands of them and held-out
documents can carry names that training never saw.
"""
from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


FIRST = _words("""Ada Adrian Agnes Ahmed Aisha Alan Alba Alice Amara Amir Ana Andre Anika Anton Arthur Astrid Aya Ben
Bianca
Bruno Carla Carlos Chen Clara Dalia Daniel David Diego Dina Edgar Elena Eli Elsa Emil Emma Erik Esther Eva Farid Fatima
Felix Fiona Frida George Gina Greta Hana Hannah Hassan Helen Henry Hugo Ida Igor Ines Irene Isaac Ivan Jack Jana Jasmin
Joan Joel Jonas Julia Kaito Karim Karin Kate Kenji Lara Laura Leah Leo Lena Liam Lin Lucas Lucy Luis Maja Malik Marco
Maria Marta Martin Maya Mei Mila Milan Mina Nadia Naomi Nasir Nia Nico Nina Noah Nora Olga Oliver Omar Oscar Pablo Paul
Petra Priya Rachel Rafael Rania Ravi Rita Robert Rosa Ruth Samir Sara Selma Simon Sofia Stefan Sven Tara Theo Thomas
Tina Tomas Uma Vera Victor Wanda Wei Yara Yusuf Zara Zoe""")

LAST = _words("""Abbott Adeyemi Alvarez Andersson Baker Banerjee Barros Becker Bennett Bianchi Brandt Carter Castillo
Chandra
Costa Cruz Dawson Diallo Dubois Duran Eriksen Fischer Fleming Fontaine Garcia Gomes Grant Haddad Hansen Hartley Hoffman
Hughes Ibrahim Ito Jansen Jensen Kamara Keller Khan Kim Kovacs Kumar Larsen Lindgren Lopez Marsh Mbeki Mendez Meyer
Moreno Morgan Mori Murphy Nakamura Ndiaye Nguyen Novak Okafor Olsen Ortiz Osei Park Patel Pereira Petrov Popescu Quinn
Rahman Reyes Rossi Sato Schmidt Shah Silva Singh Sokolov Sorensen Stone Suzuki Tanaka Torres Turner Vargas Vogel Walker
Weber Wong Yamada Young Zhang Ziegler""")

STEMS = _words("""Al Am Ar Ash Bar Bel Ber Bor Bram Brin Cal Car Cor Dal Den Dor Dun East Ed El Fal Fen Fern Gal Gor
Ham Har
Hel Hol Hurst Ing Kel Ken Kil Kor Lam Lang Lin Lor Lun Mal Mar Mel Mil Mor Nal Nor Oak Or Os Pel Pen Pol Ral Red Ros Sal
Sand Sel Sil Sol Stan Sten Sul Tal Tam Ther Tor Tres Ul Val Ver Wal Wel West Whit Win Yar Yel Zel""")

TOWN_ENDS = _words("""bridge brook bury by combe cott dale den fell field ford gate ham haven hill holm hurst ley low
march mere
minster mouth port ridge shaw side stead stoke thorpe ton vale view water well wick wood worth""")

NAME_ENDS = _words("""ak aldi amo and ano anov ara aro as ato avic ba beck berg bo by dahl dano ela elli emi ens er eri
es ett
etti evic ez ger grun hart ic idis igan ikov ila ilo ima ino io is ius kar ko la li lund man mann mark mer mo monte ner
nik oda oli oma on oni ora os osa osh ov oya ra rick rud sen shi ski son stad stein stra strom ta tani to tov u ukis ula
ura us va ve vik wala wicz ya za zi""")

SYLLABLES = _words("""ba be bi bo bra cha da de di do dra fa fe fi fo ga ge gra ha he ho i ja jo ka ke ki ko kra la le
li lo ma
me mi mo na ne ni no o pa pe pra ra re ri ro sa se shi si so sta ta te ti to tra u va ve vi vo wa ya yo za ze zo""")

PHRASES: dict[str, str] = {
    "site_kind": "depot|warehouse|plant|station|school|library|factory|boathouse|sports hall|water works|clinic|bakery"
    "|garage|market hall|power station|town hall|sawmill|pumping station|greenhouse|brewery|hangar|museum|kindergarten",
    "org_kind": "Logistics|Foods|Builders|Energy|Systems|Partners|Supplies|Freight|Tools|Textiles|Instruments|Roofing"
    "|Electric|Plumbing|Glass|Timber|Motors|Media|Farms|Marine|Bank|Insurance|Trust|Printing|Ceramics|Cleaning",
    "fault": "a cracked|a worn|a loose|a leaking|a rusty|a bent|a blocked|a broken|a burnt|a missing|a damp|a torn"
    "|a stuck*"
    "seal|bearing|pipe|valve|cable|hinge|filter|belt|bolt|window frame|gutter|fuse|hose|handrail|door lock|roof beam"
    "|pump"
    "|drain|switch|floor tile|chain|spring|gasket|fan blade|sensor|socket|ceiling panel|lamp|wheel|bracket|step"
    "|shutter",
    "part": "seal|bearing|valve|hinge|filter|belt|bolt|fuse|hose|lock|pump|switch|chain|spring|gasket|sensor|lamp"
    "|wheel",
    "spot": "the north|the south|the east|the west|the main|the rear|the old|the new|the upper|the lower*entrance"
    "|stairs"
    "|loading dock|boiler room|gate|corridor|cellar|workshop|courtyard|lift|car park|kitchen|storage room|fence|terrace"
    "|bus stop|fountain|bridge",
    "action": "replace|repair|order|inspect|clean|paint|measure|move|remove|test|label|check|insure|sell|store"
    "|photograph"
    "|return|count*the roof tiles|the fire doors|the heating pipes|the printers|the old files|the safety nets"
    "|the ladders"
    "|the water meters|the garden tools|the spare keys|the street lamps|the display cases|the work benches|the bicycles"
    "|the phone lines|the window blinds|the delivery vans|the first aid kits|the visitor badges|the smoke detectors"
    "|the storage racks|the name plates|the projectors|the parking signs|the coffee machines|the wooden floors",
    "system": "the payment|the booking|the mail|the payroll|the login|the search|the inventory|the backup|the ticket"
    "|the telephone|the library|the map|the billing|the chat*server|service|portal|system|database|gateway",
    "itfault": "an expired|a corrupt|a misconfigured|a full|a faulty|an overloaded|a broken|an outdated*certificate"
    "|disk"
    "|cache|network switch|load balancer|license file|message queue|index|firewall rule|cable|memory module|update"
    "|backup job|router|power supply|password list",
    "itfix": "a restart of|a rollback of|a repair of|an upgrade of|a cleanup of|a replacement of|a move of*the database"
    "|the mail gateway|the file server|the main router|the web cache|the storage array|the proxy|the scheduler"
    "|the login service|the archive|the operating system|the configuration",
    "itaction": "monitor|replace|document|automate|double|test|renew|separate|encrypt|review*the certificates"
    "|the backups"
    "|the disk alarms|the access rights|the network cables|the release steps|the firewall rules|the power supplies"
    "|the log files|the update process|the spare servers|the contact list",
    "role": "driver|welder|electrician|nurse|cook|gardener|painter|plumber|accountant|teacher|engineer|carpenter"
    "|librarian"
    "|technician|chemist|pilot|baker|designer|guard|cleaner|crane operator|project manager|sales manager"
    "|warehouse clerk"
    "|data analyst|forester|historian|fire officer|lawyer|translator|singer|photographer",
    "injury": "slipped on|tripped over|fell from|was hit by|cut a hand on|burned an arm on|bruised a knee on"
    "|was trapped by*"
    "a ladder|a wet ramp|a metal rail|a loose plank|a forklift|a steam pipe|a glass panel|a crate|a hot engine"
    "|a scaffold"
    "|a rolling cart|a steel cable|a garden saw",
    "hazard": "poor|missing|faulty|bad|insufficient*lighting|guard rails|brakes|training|signs|wiring|ventilation|shoes"
    "|maintenance|insulation|planning|supervision",
    "safety": "wear|check|carry|test|report|clean|lock*helmets|gloves|safety goggles|the ladders|the brakes|a radio"
    "|the exits|the tool cabinets|every near miss|the walkways|reflective vests|the lifting straps",
    "project_kind": "migration|rollout|redesign|extension|survey|relocation|renovation|pilot|archive|upgrade",
    "state": "on schedule|one week late|two weeks late|ahead of schedule|a month behind|almost finished|on hold"
    "|back on track|three days late|half done|in its final phase|slightly delayed",
    "deliverable": "the first|the revised|the final|the printed|the short|the translated|the detailed|the draft"
    "*user guide"
    "|floor plan|test report|price list|contract|training video|safety manual|schedule|cost estimate|data model"
    "|prototype"
    "|survey form|annual report|catalogue|site map|risk list|newsletter|exhibition plan|staff handbook",
    "risk": "a shortage of|a delay with|rising prices for|a dispute about|missing permits for|a lack of staff for*"
    "the steel frames|the software licenses|the solar panels|the concrete work|the translation|the test devices"
    "|the road access|the sensors|the wiring|the interviews|the exhibition hall|the delivery vans",
    "item": "ceramic|wooden|steel|glass|cotton|leather|paper|plastic|copper|woollen|rubber|painted*bowls|chairs|lamps"
    "|frames"
    "|baskets|bottles|tiles|bags|boxes|clocks|trays|cups|shelves|gloves|ropes|toys|blankets|candlesticks|buckets|vases",
    "salesreason": "the new|the longer|the redesigned|the cheaper|the extra|the early|the local*opening hours|web shop"
    "|delivery service|spring catalogue|advertising campaign|price list|market stall|loyalty card|window display"
    "|trade fair",
    "salesplan": "a small|a second|a weekend|a joint|a free|a new*price campaign|product demonstration|clearance sale"
    "|workshop"
    "|raffle|delivery round|customer survey|exhibition|newsletter|repair day",
    "machine": "the main|the second|the old|the large|the small|the hydraulic|the electric|the mobile*compressor"
    "|conveyor"
    "|crane|boiler|lathe|generator|water pump|forklift|printing press|packing machine|cooling unit|elevator|drill|mixer"
    "|saw|dishwasher|ventilator|oven",
    "dept": "finance|marketing|transport|research|purchasing|personnel|quality|export|design|legal|repair|catering"
    "|security"
    "|planning|customer service|training",
    "topic": "the office move|the summer party|the travel rules|the new logo|the parking spaces|the energy bill"
    "|data protection"
    "|the canteen menu|the training plan|the annual audit|the holiday calendar|the customer survey|the recycling plan"
    "|the website|the trade fair|the shift plan|the rental contract|the fire drill|the supplier list|the open day"
    "|the heating costs|the apprentices|the price increase|the phone system",
    "purchase": "two|three|four|six|ten|twelve|twenty*laptops|desks|bicycles|microscopes|printers|tents|cameras"
    "|radios|screens"
    "|freezers|ladders|ovens|heaters|projectors|office chairs|display cases|water tanks|tool sets",
    "duty": "the export|the customer|the safety|the supplier|the training|the energy|the archive|the summer"
    "|the repair*contracts"
    "|database|newsletter|accounts|workshops|statistics|programme|budget|complaints|schedule",
    "weather": "heavy|light|freezing|steady|scattered|sudden*rain|snow|hail|fog|drizzle|showers|thunderstorms|sleet",
    "care": "stay at home|drive slowly|close all windows|avoid the coast road|bring plants inside|carry an umbrella"
    "|check their roofs|keep away from trees|charge their phones|drink enough water|stay off the ice|tie down boats"
    "|wear warm clothes|use the train|cover their cars|clear the gutters",
    "sample": "river|well|lake|tap|rain|sea*water|sediment|foam|ice",
    "sample2": "garden|field|forest|meadow*soil|dust|compost|clay",
    "substance": "nitrate|lead|copper|zinc|iron|chlorine|arsenic|phosphate|ammonia|sulfate|mercury|nickel|calcium"
    "|fluoride",
    "method": "titration|gas chromatography|mass spectrometry|a dye test|atomic absorption|microscopy|a filter test"
    "|ion chromatography|infrared spectroscopy",
    "verdict": "safe|unsafe|acceptable|contaminated|clean|doubtful|unfit for drinking|within the norm"
    "|slightly polluted",
    "animal": "grey|white|black|red|young|brown|spotted|wild*herons|seals|foxes|owls|deer|otters|storks|bats|hares"
    "|swans|beavers"
    "|falcons|frogs|geese|badgers|cranes|toads|kites",
    "naturereason": "a mild|a dry|a long|a cold|a wet|a stormy*winter|spring|summer|autumn|breeding season|migration",
    "natureaction": "plant|count|map|protect|repair|clean|photograph*the hedges|the nests|the ponds|the nesting boxes"
    "|the river banks|the footpaths|the old oaks|the reed beds|the fences|the burrows",
    "farm_kind": "Farm|Orchard|Estate|Vineyard|Gardens|Hill Farm|Mill Farm",
    "crop": "wheat|barley|oats|rye|apples|pears|plums|potatoes|carrots|onions|grapes|hops|cabbages|beans|pumpkins"
    "|cherries"
    "|sunflowers|maize|lentils|strawberries",
    "farmreason": "a late|an early|a severe|a brief|an unusual|a second*frost|drought|heat wave|hailstorm|flood"
    "|rainy spell"
    "|plague of insects|storm",
    "farmaction": "plant|sow|rent out|fence in|water|double|test*the lower field|the upper field|the new orchard"
    "|the river meadow"
    "|the hill slope|the south field|the young trees|the old vineyard",
    "event": "a spring|a summer|a winter|a charity|a night|a children's|a folk|a river|a village*concert|market|run"
    "|festival"
    "|book fair|dance|bicycle race|lantern walk|flower show|film evening|quiz|regatta",
    "road_kind": "Road|Street|Lane|Avenue|Bridge|Square|Way|Alley",
    "works": "the repair of|the renewal of|the inspection of|the laying of|the widening of*a water main|gas pipes"
    "|the tram line"
    "|the pavement|power cables|a sewer|the crossing|the drainage|the cycle path|the street lights",
    "museum_kind": "Museum|Archive|Library|Gallery|Collection",
    "artifact": "a silver|a painted|a wooden|a bronze|a marble|a carved|a gilded|an ivory|a rare*clock|mask|chest"
    "|statue|globe"
    "|telescope|violin|compass|vase|map|crown|mirror|sundial|chess set|lantern|medal",
    "delay": "a flat|a broken|a stolen|a lost|a missing*tyre|axle|customs form|trailer|pallet|permit|truck|document",
    "product_kind": "kettle|lamp|heater|vacuum cleaner|toaster|radio|washing machine|coffee grinder|backpack"
    "|office chair"
    "|bicycle|camera|tent|mattress|blender|alarm clock",
    "defect": "the handle|the lid|the switch|the display|the cable|the motor|the cover|the battery|the zip"
    "|the front wheel*"
    "broke after a week|does not work|makes a loud noise|gets too hot|came off|arrived scratched|was missing"
    "|is too short"
    "|smells of smoke|stopped moving",
    "remedy": "a full refund|a new one|a free repair|a spare part|a discount|a voucher|a different colour|an apology"
    "|a replacement by post|a visit by a technician|half of the price back",
    "need": "the visit|the audit|the check|the complaint|the move|the request*of the fire office|of a customer"
    "|of the landlord"
    "|of the tax office|of the insurer|of the mayor|of the bank|of the architect|of the new tenant|of the sponsor",
    "reason": "a late|a cancelled|an urgent|an unexpected|a double*train|flight|repair|booking|visit|appointment"
    "|delivery|call",
    "tripaim": "visit|meet|train|advise|interview|inspect|photograph*a supplier|the new branch|an old client"
    "|the sales team"
    "|a museum|the architects|a test centre|the harbour|two applicants|the partners",
    "hotel_kind": "Hotel|Inn|Guest House|Lodge|Hostel",
    "gossip": "the choir|the football team|the book club|our neighbour|the school|the bakery|the chess club"
    "|the theatre group"
    "|my cousin|the brass band*is giving a party|moves to a new house|celebrates an anniversary|opens a cafe"
    "|has a rehearsal"
    "|is selling old books|plays in the park|holds a lottery|paints the hall|needs helpers",
    "food": "a lemon|a chocolate|an onion|a cheese|a potato|an apple|a mushroom|a carrot*cake|salad|soup|pie|tart"
    "|bread",
    "thing": "the cinema|the train|the concert|the boat|the museum|the theatre*tickets",
    "thing2": "the birthday|the wedding|the farewell*present|flowers|card",
    "ordinal": "second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|twelfth|fifteenth|twentieth|fiftieth",
    "app": "the stock|the travel|the photo|the tax|the garden|the weather|the recipe|the music|the parcel|the school"
    "*app|editor|planner|viewer|manager|assistant",
    "feature": "a faster|a new|a better|a simpler|an automatic|a shared|a hidden*search|calendar view|backup"
    "|spell check|dark mode|export to PDF|password reset|import of contacts|print preview|undo button|map view"
    "|voice input|keyboard layout|start page",
    "os": "old phones|tablets|Linux|Windows|macOS|Android|small screens|shared computers|the office network"
    "|touch screens|slow connections",
    "symptom": "the login page|the print dialog|the calendar|the attachment|the update|the sound|the invoice form"
    "|the report|the search field|the sync*stays empty|shows an error|loads for minutes|closes by itself"
    "|shows the wrong date|is not saved|appears twice|cannot be opened",
    "fixstep": "clear|reinstall|restart|update|replace|reset|check*the browser|the driver|the router|the password"
    "|the settings|the app|the headset|the certificate store|the docking station|the profile",
    "prio": "low|medium|high|urgent|normal|the lowest|the highest",
    "quantity": "temperature|humidity|pressure|vibration|noise|water level|flow|dust|power|light|salt|oxygen",
    "devaction": "replace|clean|move|recalibrate|restart|shield|repaint*the housing|the sensor head|the antenna"
    "|the battery|the mounting|the cable|the cover|the data logger",
    "breach": "a broken|an open|a damaged|a forced|a missing|a tampered|a leaking*window|door|safe|cabinet|gas tank"
    "|server rack|fire door|fence gate|alarm panel|key box|cash box|fuel tank",
    "helper": "the police|the fire brigade|the gas company|a locksmith|the security service|an electrician"
    "|the building manager|the insurance expert|the rescue service",
}

MONTHS = _words("January February March April May June July August September October November December")
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
UNITS = ("minutes", "hours", "days", "weeks", "months")
NUMBER_WORDS = _words("two three four five six seven eight nine ten eleven twelve fifteen twenty thirty")


def expand(pattern: str) -> list[str]:
    """All phrases of a table entry: `a|b*c|d` is a c, a d, b c, b d."""
    left, star, right = pattern.partition("*")
    if not star:
        return left.split("|")
    return [f"{a} {b}" for a in left.split("|") for b in right.split("|")]


TABLES: dict[str, list[str]] = {name: expand(pattern) for name, pattern in PHRASES.items()}

"""The bundled English word sets, for development on real models: made by rule from the tables below.

    python benchmarks/word_sets.py            # writes laai_core/data/word_sets/*.json

past_tense: a verb and its simple past. capitals: a country and its capital. american: a British spelling and the
American one. Left out are verbs with two past forms in use, countries whose capital is disputed or moving, and
spellings that are common on both sides.
"""

from __future__ import annotations

import json
from pathlib import Path

from laai_core.data.pairs import WORD_SETS

REGULAR = """
accept add admire agree allow amuse announce answer appear arrest arrive ask attack attract avoid bake balance
beg behave belong blame boil borrow bounce breathe brush bury call carry cause change charge chase cheat check cheer
chew clap clean collect compare complain complete confess connect consider contain continue copy correct cough count
cover cross cry damage dance decide decorate deliver deny depend describe deserve destroy develop disagree disappear
discover divide double drag drop dry earn employ empty encourage enjoy enter escape examine excite exist expand expect
explain explode face fade fail fetch film fill fix float fold follow force form found gather glue grab greet grin guess
hammer handle happen hate heal help hope hug hunt hurry identify ignore imagine improve include increase inform invite
iron jog join joke judge jump kick kill kiss knock land last laugh launch like list listen live load lock look love
manage march marry match measure melt mix move multiply murder nail name need nod note obey offer open order owe own
paint park pass paste pause permit phone pick place plan play please point polish pour pray prefer prepare
press pretend prevent print produce promise protect pull punch punish push question rain raise reach receive
record reduce refer reflect refuse regret reject relax remain remember remind remove repair repeat replace reply report
rescue rest return rob roll rub ruin save scare scream search shave shop shout sign skip slip smile smoke snow solve
sound stare start stay step stop strap study succeed suffer suggest supply support suppose surprise talk taste tease
thank tie touch train trap treat trip trust try turn type use visit wait walk want warn wash watch wave whip
whisper whistle wink wipe wish wonder work worry wrap yawn zip
""".split()
# The last consonant is doubled behind a stressed short vowel.
DOUBLED = set(
    "beg clap drag drop grab grin hug jog nod permit plan prefer refer regret rob rub shop skip slip step stop strap "
    "trap trip whip wrap zip".split()
)
IRREGULAR = dict(
    pair.split(":")
    for pair in """
arise:arose become:became begin:began bend:bent bite:bit bleed:bled blow:blew break:broke breed:bred
bring:brought build:built buy:bought catch:caught choose:chose cling:clung come:came creep:crept deal:dealt dig:dug
do:did draw:drew drink:drank drive:drove eat:ate fall:fell feed:fed feel:felt fight:fought find:found flee:fled
fling:flung fly:flew forbid:forbade forget:forgot forgive:forgave freeze:froze get:got give:gave go:went grind:ground
grow:grew have:had hear:heard hide:hid hold:held keep:kept know:knew lay:laid lead:led leave:left lend:lent
lose:lost make:made mean:meant meet:met pay:paid ride:rode ring:rang rise:rose run:ran say:said see:saw seek:sought
sell:sold send:sent shake:shook shoot:shot shrink:shrank sing:sang sink:sank sit:sat sleep:slept slide:slid
speak:spoke spend:spent spin:spun stand:stood steal:stole stick:stuck sting:stung stride:strode strike:struck
swear:swore sweep:swept swim:swam swing:swung take:took teach:taught tear:tore tell:told think:thought throw:threw
understand:understood wear:wore weave:wove weep:wept win:won wring:wrung write:wrote
""".split()
)
CAPITALS = """
Afghanistan: Kabul; Albania: Tirana; Algeria: Algiers; Andorra: Andorra la Vella; Angola: Luanda
Argentina: Buenos Aires; Armenia: Yerevan; Australia: Canberra; Austria: Vienna; Azerbaijan: Baku; Bahrain: Manama
Bangladesh: Dhaka; Barbados: Bridgetown; Belarus: Minsk; Belgium: Brussels; Belize: Belmopan; Bhutan: Thimphu
Botswana: Gaborone; Brazil: Brasilia; Brunei: Bandar Seri Begawan; Bulgaria: Sofia; Burkina Faso: Ouagadougou
Cambodia: Phnom Penh; Cameroon: Yaounde; Canada: Ottawa; Cape Verde: Praia; Central African Republic: Bangui
Chad: N'Djamena; Chile: Santiago; China: Beijing; Colombia: Bogota; Comoros: Moroni; Costa Rica: San Jose
Croatia: Zagreb; Cuba: Havana; Cyprus: Nicosia; Denmark: Copenhagen; Djibouti: Djibouti; Dominica: Roseau
Dominican Republic: Santo Domingo; Ecuador: Quito; Egypt: Cairo; El Salvador: San Salvador; Eritrea: Asmara
Estonia: Tallinn; Ethiopia: Addis Ababa; Fiji: Suva; Finland: Helsinki; France: Paris; Gabon: Libreville
Georgia: Tbilisi; Germany: Berlin; Ghana: Accra; Greece: Athens; Grenada: Saint George's; Guatemala: Guatemala City
Guinea: Conakry; Guinea-Bissau: Bissau; Guyana: Georgetown; Haiti: Port-au-Prince; Honduras: Tegucigalpa
Hungary: Budapest; Iceland: Reykjavik; India: New Delhi; Iran: Tehran; Iraq: Baghdad; Ireland: Dublin; Italy: Rome
Jamaica: Kingston; Japan: Tokyo; Jordan: Amman; Kenya: Nairobi; Kiribati: Tarawa; Kuwait: Kuwait City
Kyrgyzstan: Bishkek; Laos: Vientiane; Latvia: Riga; Lebanon: Beirut; Lesotho: Maseru; Liberia: Monrovia
Libya: Tripoli; Liechtenstein: Vaduz; Lithuania: Vilnius; Luxembourg: Luxembourg; Madagascar: Antananarivo
Malawi: Lilongwe; Maldives: Male; Mali: Bamako; Malta: Valletta; Marshall Islands: Majuro; Mauritania: Nouakchott
Mauritius: Port Louis; Mexico: Mexico City; Micronesia: Palikir; Moldova: Chisinau; Monaco: Monaco
Mongolia: Ulaanbaatar; Montenegro: Podgorica; Morocco: Rabat; Mozambique: Maputo; Namibia: Windhoek; Nepal: Kathmandu
Netherlands: Amsterdam; New Zealand: Wellington; Nicaragua: Managua; Niger: Niamey; Nigeria: Abuja
North Korea: Pyongyang; North Macedonia: Skopje; Norway: Oslo; Oman: Muscat; Pakistan: Islamabad; Palau: Ngerulmud
Panama: Panama City; Papua New Guinea: Port Moresby; Paraguay: Asuncion; Peru: Lima; Philippines: Manila
Poland: Warsaw; Portugal: Lisbon; Qatar: Doha; Romania: Bucharest; Russia: Moscow; Rwanda: Kigali
Saint Kitts and Nevis: Basseterre; Saint Lucia: Castries; Saint Vincent and the Grenadines: Kingstown; Samoa: Apia
San Marino: San Marino; Saudi Arabia: Riyadh; Senegal: Dakar; Serbia: Belgrade; Seychelles: Victoria
Sierra Leone: Freetown; Singapore: Singapore; Slovakia: Bratislava; Slovenia: Ljubljana; Solomon Islands: Honiara
Somalia: Mogadishu; South Korea: Seoul; South Sudan: Juba; Spain: Madrid; Sudan: Khartoum; Suriname: Paramaribo
Sweden: Stockholm; Switzerland: Bern; Syria: Damascus; Tajikistan: Dushanbe; Thailand: Bangkok; The Bahamas: Nassau
The Gambia: Banjul; Togo: Lome; Tonga: Nuku'alofa; Trinidad and Tobago: Port of Spain; Tunisia: Tunis; Turkey: Ankara
Turkmenistan: Ashgabat; Tuvalu: Funafuti; Uganda: Kampala; Ukraine: Kyiv; United Arab Emirates: Abu Dhabi
United Kingdom: London; United States: Washington; Uruguay: Montevideo; Uzbekistan: Tashkent; Vanuatu: Port Vila
Venezuela: Caracas; Vietnam: Hanoi; Zambia: Lusaka; Zimbabwe: Harare
"""
# British words by the rule that makes them American: (what is replaced, by what) and the words.
SPELLINGS = {
    ("our", "or"): """
arbour ardour armour behaviour candour clamour clamoured colour coloured colourful colouring demeanour discolour
dishonour enamour endeavour favour favourable favoured favourite fervour flavour flavoured flavouring harbour honour
honourable honoured humour labour labourer misbehaviour neighbour neighbourhood neighbouring odour parlour rancour
rigour rumour saviour savour savoury splendour succour tumour valour vapour vigour watercolour""",
    ("tre", "ter"): """
calibre:caliber centimetre centre fibre:fiber kilometre litre lustre manoeuvre:maneuver meagre:meager metre millimetre
mitre ochre:ocher reconnoitre sabre:saber sceptre sombre:somber spectre theatre""",
    ("is", "iz"): """
agonise apologise authorise baptise capitalise categorise centralise characterise civilise colonise computerise
criticise crystallise dramatise economise emphasise equalise fantasise fertilise finalise formalise generalise
harmonise hospitalise hypnotise idealise immunise industrialise italicise jeopardise legalise localise maximise
memorise minimise mobilise modernise monopolise nationalise neutralise normalise organisation organise organiser
penalise personalise philosophise polarise popularise prioritise privatise publicise realise recognise
revolutionise scrutinise socialise specialise stabilise standardise sterilise subsidise summarise symbolise sympathise
theorise utilise vandalise visualise""",
    ("ys", "yz"): "analyse analysed catalyse paralyse paralysed",
    ("ll", "l"): """
cancelled cancelling counsellor dialled equalled fuelled fuelling initialled jeweller jewellery:jewelry labelled
labelling levelled marvellous modelled modelling panelled pencilled quarrelled quarrelling rivalled shovelled signalled
signalling snorkelling spiralled totalled travelled traveller travelling tunnelling unravelled woollen""",
    ("l", "ll"): """
appal:appall distil:distill enrol:enroll enrolment:enrollment enthral:enthrall fulfil:fulfill fulfilment:fulfillment
instalment:installment skilful:skillful wilful:willful""",
    ("ae", "e"): "anaemia anaemic anaesthetic encyclopaedia gynaecology haemorrhage leukaemia orthopaedic paediatric",
    ("oe", "e"): "diarrhoea foetus oesophagus oestrogen",
    ("ce", "se"): "defence licence offence pretence",
    ("ogue", "og"): "analogue catalogue",
    ("", ""): """
aeroplane:airplane aluminium:aluminum cheque:check chequered:checkered cosy:cozy draught:draft grey:gray
kerb:curb mould:mold mouldy:moldy moustache:mustache plough:plow pyjamas:pajamas sceptic:skeptic sceptical:skeptical
smoulder:smolder sulphur:sulfur tyre:tire programme:program storey:story""",
}


def past_tense(verb: str) -> str:
    """The simple past: by the table, or by the rules of English spelling."""
    if verb in IRREGULAR:
        return IRREGULAR[verb]
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + (verb[-1] if verb in DOUBLED else "") + "ed"


def american() -> dict[str, str]:
    """British spellings and theirs; a colon gives what no rule makes."""
    pairs = {}
    for (before, after), words in SPELLINGS.items():
        for word in words.split():
            british, colon, given = word.partition(":")
            # At the last place of the word: "colourful" has one, "organisation" has another "is" before none.
            head, _, tail = british.rpartition(before) if before else ("", "", "")
            pairs[british] = given if colon else f"{head}{after}{tail}"
    return pairs


def capitals() -> dict[str, str]:
    """Countries and capitals, in ASCII."""
    entries = [entry for line in CAPITALS.strip().splitlines() for entry in line.split("; ")]
    return {country: capital for country, _, capital in (entry.partition(": ") for entry in entries)}


def word_sets() -> dict[str, dict[str, str]]:
    """Every set by its name, sorted by input."""
    sets = {
        "past_tense": {verb: past_tense(verb) for verb in [*REGULAR, *IRREGULAR]},
        "capitals": capitals(),
        "american": american(),
    }
    return {name: dict(sorted(pairs.items())) for name, pairs in sets.items()}


def text(pairs: dict[str, str]) -> str:
    """A set in Todd et al.'s format, a pair a line."""
    records = [json.dumps({"input": word, "output": answer}, ensure_ascii=False) for word, answer in pairs.items()]
    return "[\n" + ",\n".join(records) + "\n]\n"


def main(folder: Path = WORD_SETS) -> None:
    """Write the files."""
    folder.mkdir(exist_ok=True)
    for name, pairs in word_sets().items():
        (folder / f"{name}.json").write_text(text(pairs), encoding="utf-8")
        print(f"{name}: {len(pairs)}")


if __name__ == "__main__":
    main()

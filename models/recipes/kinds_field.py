"""Document kinds from outdoors, the laboratory and the neighbourhood, in the notation of `grammar.parse_kinds`."""

KINDS = """
KIND weather
title: Weather bulletin | Weather for {town} | Forecast | Weather report
= front!
d: {weather} will reach {town} on {weekday} [around|at about] {time}.
d: On {weekday} at about {time}, {weather} [arrives in|moves over] {town}.
d: {town} can expect {weather} from {time} on {weekday}.
b: {weather} will reach {town} on {weekday} at about {time}.
f: weather town weekday time
q: What weather is expected? => {weather}
q: Which town does the bulletin concern? | Where is the weather expected? => {town}
q: On which day does it arrive? => {weekday}
q: At what time does it arrive? => {time}
= temp!
d: Temperatures [fall to|drop to|reach] {temp}.
d: It will be {temp} at most.
d: The thermometer will show {temp}.
b: Temperatures reach {temp}.
f: temp
q: What temperature is expected? => {temp}
= wind!
d: Gusts of up to {wind} are [possible|expected] near {town2}.
d: Near {town2} the wind may reach {wind}.
b: Gusts of {wind} are expected near {town2}.
f: wind town2
q: How strong is the wind? | How strong are the gusts? => {wind}
q: Where are gusts expected? => {town2}
= rain!
d: Up to {rain} of rain may fall.
d: {rain} of rain [is|are] expected in total.
b: Up to {rain} of rain may fall.
f: rain
q: How much rain may fall? => {rain}
= advice!
d: {person} of the weather office advises people to {care}.
d: People should {care}, says {person} of the weather office.
b: {person} advises people to {care}.
f: person care
q: Who gives the advice? => {person}
q: What should people do? | What is the advice? => {care}
= after!
d: From {weekday2} on it will be calm again.
d: By {weekday2} the sky will clear.
b: It will be calm again from {weekday2}.
f: weekday2
q: When will it be calm again? => {weekday2}
x: The last {month} was unusually mild.
x: Morning fog is common at this time of the year.
x: The station at {town3} was out of order.
x: Pollen counts stay low.
x: The next bulletin follows in the evening.

KIND lab
title: Laboratory report | Test report {code} | Lab note | Analysis of {sample}
= test!
d: {person} tested {sample} from {town} on {date}.
d: On {date}, {sample} from {town} [was|were] tested by {person}.
d: {sample} taken in {town} [was|were] analysed by {person} on {date}.
b: {person} tested {sample} from {town} on {date}.
f: person sample town date
q: Who did the test? | Who tested the sample? => {person}
q: What was tested? => {sample}
q: Where did the sample come from? => {town}
q: When was the test? => {date}
= result!
d: The [result|measured value] was {conc} of {substance}.
d: {conc} of {substance} [was|were] measured.
d: The analysis showed {conc} of {substance}.
b: It contained {conc} of {substance}.
f: conc substance
q: How much was measured? | What was the result? => {conc}
q: Which substance was measured? => {substance}
= limit!
d: The limit is {conc2}.
d: The permitted value is {conc2}.
b: The limit is {conc2}.
f: conc2
q: What is the limit? => {conc2}
= method
d: The method was {method}.
d: {method} was used, with {num3} repeats.
q: Which method was used? => {method}
= judge!
d: The sample was therefore [judged|declared] {verdict}.
d: The laboratory calls the sample {verdict}.
b: The sample was judged {verdict}.
f: verdict
q: How was the sample judged? => {verdict}
= next!
d: A second sample will be taken on {date2} by {person2}.
d: {person2} will take another sample on {date2}.
b: {person2} will take another sample on {date2}.
f: person2 date2
q: Who will take another sample? => {person2}
q: When will another sample be taken? => {date2}
x: The sample arrived cooled and sealed.
x: Instrument {code2} had been calibrated in {month}.
x: Colour and smell were normal.
x: The remaining material is kept for {years2}.
x: The report was read by {person3}.

KIND survey
title: Field survey | Survey notes: {animal} | Wildlife count | Field report
= count!
d: {person} counted {num} {animal} [near|around] {town} on {date}.
d: On {date}, {person} counted {num} {animal} near {town}.
d: Near {town}, {num} {animal} were counted by {person} on {date}.
b: {person} counted {num} {animal} near {town} on {date}.
f: person num animal town date
q: Who did the count? | Who counted the animals? => {person}
q: How many animals were counted? => {num}
q: Which animals were counted? => {animal}
q: Where was the count? => {town}
q: When was the count? => {date}
= trend!
d: A year ago there were {num2}.
d: The last survey had found {num2}.
b: A year ago there were {num2}.
f: num2
q: How many were there a year ago? => {num2}
= reason!
d: The likely reason for the change is {naturereason}.
d: {person.last} explains the change by {naturereason}.
d: {naturereason} is seen as the reason.
b: The likely reason is {naturereason}.
f: naturereason
q: What is the likely reason? | How is the change explained? => {naturereason}
= plan!
d: The team wants to {natureaction} in {month}.
d: In {month} the team will {natureaction}.
b: The team will {natureaction} in {month}.
f: natureaction month
q: What will the team do? => {natureaction}
q: When will the team act? => {month}
= money!
d: {org} pays {money} for the work.
d: The work is paid by {org} with {money}.
b: {org} pays {money}.
f: org money
q: Who pays for the work? => {org}
q: How much is paid? => {money}
x: Visibility was poor in the first hour.
x: {num3} volunteers walked along the river.
x: Boots and warm clothes were needed.
x: A rare plant was seen beside the path.
x: The map is sheet {code}.

KIND harvest
title: Harvest report | News from the farm | Farm note | Report from {farm}
= crop!
d: {person} of {farm} harvested {weight} of {crop} in {month}.
d: In {month}, {farm}, run by {person}, brought in {weight} of {crop}.
d: {farm}, led by {person}, harvested {weight} of {crop} in {month}.
b: {person} of {farm} harvested {weight} of {crop} in {month}.
f: person farm weight crop month
q: Who runs the farm? => {person}
q: Which farm is it? => {farm}
q: What was harvested? | Which crop was harvested? => {crop}
q: How much was harvested? => {weight}
q: In which month was the harvest? => {month}
= cause!
d: The yield was shaped by {farmreason}.
d: {farmreason} shaped the year.
d: The main influence was {farmreason}.
b: The yield was shaped by {farmreason}.
f: farmreason
q: What shaped the yield? | What was the main influence? => {farmreason}
= price!
d: The crop was sold to {org} for {money}.
d: {org} bought it for {money}.
b: {org} bought it for {money}.
f: org money
q: Who bought the crop? => {org}
q: What was the price? | For how much was it sold? => {money}
= next!
d: Next year the farm will {farmaction}.
d: For next year the plan is to {farmaction}.
b: Next year the farm will {farmaction}.
f: farmaction
q: What will the farm do next year? => {farmaction}
= hands
d: {num} helpers worked in the fields.
d: The work was done by {num} seasonal helpers.
q: How many helpers worked in the fields? => {num}
x: The barn got a new roof in {month2}.
x: The tractor ran without trouble.
x: {person3} drove the last load home.
x: Rain stayed away during the last week.
x: The farm shop is open on {weekday}.

KIND event
title: Event announcement | Invitation | Save the date | News from {town}
= what!
d: {event} takes place in {town} on {date} at {time}.
d: On {date} at {time}, {town} holds {event}.
d: {town} invites everybody to {event} on {date} at {time}.
b: {event} takes place in {town} on {date} at {time}.
f: event town date time
q: What takes place? | What is announced? => {event}
q: Where does it take place? | In which town is it? => {town}
q: When does it take place? | On what date is it? => {date}
q: At what time does it begin? => {time}
= where!
d: The meeting point is {spot}.
d: Visitors gather at {spot}.
b: Visitors meet at {spot}.
f: spot
q: Where do visitors meet? | What is the meeting point? => {spot}
= guest!
d: The guest of honour is {person}, a {role}.
d: {person}, a {role}, will [speak|open the day].
b: {person}, a {role}, is the guest.
f: person role
q: Who is the guest? => {person}
= price!
d: Tickets cost {money}.
d: Entry costs {money}.
b: Tickets cost {money}.
f: money
q: How much is a ticket? | What does entry cost? => {money}
= sign!
d: Please register with {person2} by {date2}.
d: Registration is open until {date2} with {person2}.
b: Register with {person2} by {date2}.
f: person2 date2
q: With whom should one register? => {person2}
q: By when should one register? => {date2}
= history
d: It is held for the {ordinal} time.
d: This is the {ordinal} edition.
q: For which time is it held? => {ordinal}
x: Food and drinks will be sold.
x: Dogs must be kept on a lead.
x: The main street is closed from the early morning.
x: Last year {num3} visitors came.
x: The band starts late in the evening.

KIND transport
title: Traffic notice | Road works | Travel notice for {town}
= close!
d: {road} in {town} is closed from {date} [until|to] {date2}.
d: From {date} to {date2}, {road} in {town} will be closed.
d: {town} closes {road} between {date} and {date2}.
b: {road} in {town} is closed from {date} to {date2}.
f: road town date date2
q: What is closed? | Which road is closed? => {road}
q: In which town is the closure? => {town}
q: From when is it closed? => {date}
q: Until when is it closed? => {date2}
= why!
d: The reason is {works}.
d: Workers need the time for {works}.
d: This is because of {works}.
b: The reason is {works}.
f: works
q: Why is it closed? | What is the reason? => {works}
= detour!
d: Drivers should use {road2} instead.
d: A detour leads over {road2}.
b: Drivers should use {road2}.
f: road2
q: Which road should drivers use? | Where does the detour lead? => {road2}
= bus!
d: Bus {bus} will [stop|start] at {spot}.
d: The stop of bus {bus} moves to {spot}.
b: Bus {bus} stops at {spot}.
f: bus spot
q: Where does the bus stop? => {spot}
q: Which bus is affected? => {bus}
= cost!
d: The work is done by {org} and costs {money}.
d: {org} does the work for {money}.
b: {org} does the work for {money}.
f: org money
q: Who does the work? => {org}
q: How much does the work cost? => {money}
= contact
d: Questions are answered by {person} at the town hall.
d: {person} at the town hall answers questions.
q: Who answers questions? => {person}
x: Cyclists can pass at any time.
x: The street was last repaired years ago.
x: Noise is to be expected in the morning.
x: About {num3} cars use it every day.
x: Shops remain open.

KIND collection
title: Museum news | Library note | News from the archive | New in the collection
= gift!
d: {museum} has received {artifact} from {person}.
d: {person} gave {artifact} to {museum}.
d: {artifact} was [given|donated] to {museum} by {person}.
b: {person} gave {artifact} to {museum}.
f: museum artifact person
q: Who made the gift? | Who gave it? => {person}
q: What was given? | What did the museum receive? => {artifact}
q: Who received the gift? => {museum}
= age!
d: It dates from {year}.
d: It was made in {year}.
b: It dates from {year}.
f: year
q: When was it made? | From which year is it? => {year}
= value!
d: Experts value it at {money}.
d: Its value is put at {money}.
b: It is valued at {money}.
f: money
q: What is it worth? | What is its value? => {money}
= show!
d: It can be seen in {room} from {date}.
d: From {date} it is on show in {room}.
b: It is on show in {room} from {date}.
f: room date
q: Where can it be seen? => {room}
q: From when can it be seen? => {date}
= found!
d: It had been kept in {spot} for {years}.
d: For {years} it lay in {spot}.
b: It had been kept in {spot} for {years}.
f: spot years
q: Where had it been kept? => {spot}
q: For how long had it been kept there? => {years}
= restore
d: {person2} cleaned it by hand.
d: It was restored by {person2}.
q: Who restored it? => {person2}
x: The museum is closed on {weekday}.
x: Entry is free for children.
x: The catalogue number is {code}.
x: {num3} people visited on the first day.
x: The lighting was renewed in {month}.
"""

"""Document kinds of software and machines, and threads of several mails, in the notation of `grammar.parse_kinds`.

The statements of a thread alternate between its writers: the first is the sender's, the next two the reader's, the next
two the sender's again.
"""

KINDS = """
KIND release
title: Release notes | Release notes for {product} | {app} {version} | What is new in {app}
= out!
d: Version {version} of {app} [was released|is out|went live] on {date}.
d: On {date} the team of {person} [released|published] {app} {version}.
d: {app} {version} is available since {date}.
b: {app} {version} was released on {date}.
f: app version date
q: Which version was released? | What is the version? => {version}
q: When was it released? | What is the release date? => {date}
q: Which program is it? | What was released? => {app}
= new!
d: It [adds|brings] {feature}.
d: New in this version is {feature}.
d: Users get {feature}.
b: It brings {feature}.
f: feature
q: What is new? | What does the version add? => {feature}
= bug!
d: A bug in {feature2}, reported by {person2}, is fixed.
d: {person2} fixed a bug in {feature2}.
d: Thanks to {person2}, {feature2} no longer crashes.
b: {person2} fixed a bug in {feature2}.
f: person2 feature2
q: Who fixed the bug? | Who worked on the bug? => {person2}
q: Where was the bug? => {feature2}
= known!
d: Known problem: {feature3} does not work on {os}.
d: On {os}, {feature3} is not available yet.
b: {feature3} does not work on {os}.
f: feature3 os
q: What does not work yet? | What is the known problem? => {feature3}
q: On which system does it not work? => {os}
= numbers!
d: The release closes {count} bugs and {count2} wishes.
d: {count} bugs and {count2} wishes were closed.
b: It closes {count} bugs and {count2} wishes.
f: count count2
q: How many bugs were closed? => {count}
q: How many wishes were closed? => {count2}
s: How many bugs and wishes were closed in total? | What is the total of bugs and wishes? => {count} {count2}
= size!
d: The download has {num} megabytes.
d: With {num} megabytes the download is [smaller|larger] than before.
b: The download has {num} megabytes.
f: num
q: How large is the download? => {num} megabytes
= nextone!
d: The next version is planned for {month}.
d: {month} will bring the next version.
b: The next version is planned for {month}.
f: month
q: When will the next version come? => {month}
x: Please make a backup before you install it.
x: The old settings are kept.
x: The manual was not changed.
x: {num3} people took part in the test.
x: The source is tagged {code3}.

KIND support
title: Support ticket {code} | Ticket {code} | Help desk note | Support case
= open!
d: {person} from {org} opened ticket {code2} on {date}: {symptom}.
d: On {date}, {person} of {org} reported in ticket {code2} that {symptom}.
d: Ticket {code2} by {person} from {org}, {date}: {symptom}.
b: {person} from {org} reported on {date} that {symptom} (ticket {code2}).
f: person org date symptom code2
q: Who opened the ticket? | Who reported the problem? => {person}
q: Which company does the ticket come from? => {org}
q: What is the problem? | What was reported? => {symptom}
q: What is the number of the ticket? | What is the ticket number? => {code2}
q: When was the ticket opened? => {date}
= where!
d: It happens with {app} on {os}.
d: The customer uses {app} on {os}.
b: It happens with {app} on {os}.
f: app os
q: Which program is concerned? => {app}
q: Which operating system does the customer use? | On which system does it happen? => {os}
= prio!
d: The priority is {prio}.
d: It was given {prio} priority.
b: The priority is {prio}.
f: prio
q: What is the priority? => {prio}
= advice!
d: {person2} advised the customer to {fixstep}.
d: The advice of {person2} was to {fixstep}.
d: {person2} from the help desk said they should {fixstep}.
b: {person2} advised them to {fixstep}.
f: person2 fixstep
q: Who gave the advice? | Who answered? => {person2}
q: What was the advice? | What should the customer do? => {fixstep}
= result!
d: After {duration} the ticket was [closed|solved].
d: The case was solved within {duration}.
b: It was solved after {duration}.
f: duration
q: How long did it take to solve it? | After what time was it solved? => {duration}
= calls!
d: The customer called {count} times and wrote {count2} mails.
d: There were {count} calls and {count2} mails about it.
b: There were {count} calls and {count2} mails.
f: count count2
q: How many calls were there? => {count}
q: How many mails were there? => {count2}
s: How many calls and mails were there in total? | How often did the customer call or write? => {count} {count2}
x: The customer could send a screenshot.
x: The same question came up in {month}.
x: The log file was {num3} lines long.
x: The contract runs until {date3}.
x: The customer was friendly.

KIND sensors
title: Sensor log | Monitoring report: {site} | Readings of {date2} | Measurement log
= place!
d: The {quantity} sensor at {site} [sent|recorded] {count} readings on {date}.
d: On {date}, {count} readings came from the {quantity} sensor at {site}.
d: {count} readings of the {quantity} sensor at {site} arrived on {date}.
b: The {quantity} sensor at {site} sent {count} readings on {date}.
f: quantity site count date
q: What does the sensor measure? => {quantity}
q: Where is the sensor? => {site}
q: How many readings were there? => {count}
q: On which day were the readings taken? | When were the readings taken? => {date}
= low!
d: The lowest value was {level} at {time}.
d: At {time} it fell to {level}, the lowest value.
b: The lowest value was {level} at {time}.
f: level time
q: What was the lowest value? => {level}
q: When was the lowest value reached? => {time}
= high!
d: The highest value was {level2} at {time2}.
d: It peaked at {level2} at {time2}.
b: The highest value was {level2} at {time2}.
f: level2 time2
q: What was the highest value? => {level2}
q: When was the highest value reached? => {time2}
= alarm!
d: There were {count2} warnings and {count3} alarms.
d: The station raised {count2} warnings and {count3} alarms.
b: There were {count2} warnings and {count3} alarms.
f: count2 count3
q: How many warnings were there? => {count2}
q: How many alarms were there? => {count3}
s: How many warnings and alarms were there in total? | What is the sum of warnings and alarms? => {count2} {count3}
= gap!
d: From {time3} on, no data came for {duration} because of {itfault}.
d: Data is missing for {duration} after {time3}; the cause was {itfault}.
b: Data is missing for {duration} after {time3} because of {itfault}.
f: duration time3 itfault
q: How long was data missing? => {duration}
q: Since when was data missing? => {time3}
q: Why was data missing? => {itfault}
= who!
d: {person} checked the device and decided to {devaction}.
d: After a look at the device, {person} wants to {devaction}.
b: {person} will {devaction}.
f: person devaction
q: Who checked the device? => {person}
q: What will be done with the device? => {devaction}
x: Values are averages over ten minutes.
x: The battery stands at {percent3}.
x: The clock was set to winter time.
x: Wind and rain had no influence.
x: The device carries the number {code3}.

KIND incident
title: Incident report | Incident {code} | Security note | Report of an incident
= what!
d: On {date} at {time}, {person} [noticed|discovered] {breach} at {site}.
d: {person} [noticed|found] {breach} at {site} on {date} at {time}.
d: At {time} on {date}, {breach} was noticed at {site} by {person}.
b: {person} noticed {breach} at {site} on {date} at {time}.
f: person breach site date time
q: Who noticed it? | Who discovered the incident? => {person}
q: What was noticed? | What happened? => {breach}
q: Where did it happen? => {site}
q: When did it happen? | On what date was it? => {date}
q: At what time was it noticed? => {time}
= loss!
d: The damage is [put|estimated] at {money}.
d: It will cost about {money}.
b: The damage is about {money}.
f: money
q: How large is the damage? | What is the damage? => {money}
= people!
d: {count} employees and {count2} visitors had to leave the building.
d: The building was cleared: {count} employees and {count2} visitors went outside.
b: {count} employees and {count2} visitors had to leave.
f: count count2
q: How many employees had to leave? => {count}
q: How many visitors had to leave? => {count2}
s: How many people had to leave in total? | How many employees and visitors were there together? => {count} {count2}
= called!
d: {person2} called {helper}, who came after {duration}.
d: {helper} came {duration} after the call by {person2}.
b: {person2} called {helper}, who came after {duration}.
f: person2 helper duration
q: Who made the call? => {person2}
q: Who was called? | Who came to help? => {helper}
q: How long did it take them to come? => {duration}
= measure!
d: As a consequence, staff will {itaction} until {date2}.
d: {person3} proposed to {itaction} by {date2}.
b: The plan is to {itaction} by {date2}.
f: itaction date2
q: What is planned? | What is the consequence? => {itaction}
q: By when will it be done? => {date2}
x: Nobody was in danger.
x: The doors were locked at that time.
x: The neighbours heard nothing.
x: The insurance was told in writing.
x: Cameras were off because of {fault3}.

KIND orders
form: thread
= want!
d: We need {count} {item} for {event} on {date}. Can you help?
d: Can you send us {count} {item}? They are for {event} on {date}.
d: For {event} on {date} we are looking for {count} {item}.
b: {sender} needs {count} {item} for {event} on {date}.
f: sender count item event date
q: What is needed? | What does {sender} need? => {item}
q: How many are needed? => {count}
q: What are they for? => {event}
q: When is the event? => {date}
q: Who wrote first? | Who wrote the first mail? => {sender}
= offer!
d: Yes, we can deliver them by {date2} for {money}.
d: We have them. The price is {money}, and they would arrive by {date2}.
b: {reader} offers them for {money} by {date2}.
f: reader money date2
q: What is the price? | How much do they cost? => {money}
q: By when can they be delivered? => {date2}
q: Who answered? | Who makes the offer? => {reader}
= extra!
d: We could add {count2} more in a [second|different] colour.
d: If you like, there are {count2} more in stock.
b: {count2} more are possible.
f: count2
q: How many more are possible? => {count2}
s: How many would that be in total? | How many are that with the additional ones? => {count} {count2}
= bill!
d: That is fine. Please send the bill to {person}.
d: Agreed. {person} will pay the bill.
b: The bill goes to {person}.
f: person
q: Who gets the bill? | Who pays the bill? => {person}
= address!
d: Deliver them to {spot} of {site}, please.
d: The goods should go to {spot} of {site}.
b: They go to {spot} of {site}.
f: spot site
q: Where should they be delivered exactly? => {spot}
q: To which place should they be delivered? => {site}
x: Thank you for the quick answer.
x: Last year everything went well.
x: I will be out of the office on {weekday3}.
x: Please excuse the late reply.
x: Our number is {num3}.

KIND planning
form: thread
= idea!
d: Could we [meet|talk] about {topic} on {weekday} at {time}?
d: I would like to talk with you about {topic}. Does {weekday} at {time} suit you?
b: {sender} wants to talk about {topic} on {weekday} at {time}.
f: sender topic weekday time
q: What should the talk be about? | What is the subject of the thread? => {topic}
q: Who proposed the meeting? | Who wrote the first mail? => {sender}
q: Which day was proposed first? => {weekday}
q: Which time was proposed first? => {time}
= change!
d: I am sorry, {reason} makes that impossible. How about {weekday2} at {time2}?
d: Because of {reason} I cannot come. {weekday2} at {time2} would be better.
b: Because of {reason}, {reader} prefers {weekday2} at {time2}.
f: reason reader weekday2 time2
q: Why does the first date not suit? | What is the reason for the change? => {reason}
q: Which day does {reader} prefer? | What is the new day? => {weekday2}
q: What is the new time? => {time2}
= guest!
d: May I bring {person} along, our {role}?
d: I would bring {person}, our {role}.
b: {reader} brings {person}, a {role}.
f: reader person role
q: Who comes along? | Whom does {reader} bring? => {person}
q: What is the job of the guest? => {role}
= agreed!
d: That works. I have booked {room}.
d: Good, then in {room}.
b: They meet in {room}.
f: room
q: Where do they meet? | Which room is booked? => {room}
= task!
d: Please {action} before that.
d: Until then, could you {action}?
b: {reader} should {action} before that.
f: reader action
q: What should {reader} do before? => {action}
x: I hope you are well.
x: The last talk was very useful.
x: The train connection is good.
x: I had no time to call.
x: There is coffee in the kitchen.
"""

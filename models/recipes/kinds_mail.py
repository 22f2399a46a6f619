"""Document kinds that people send each other, in the notation of `grammar.parse_kinds`."""

KINDS = """
KIND delivery
title: Delivery note | Shipment {code} | Note about a delivery | Goods received
= send!
d: {org} [shipped|sent] {num} boxes of {item} to {town} on {date}.
d: On {date}, {num} boxes of {item} [left for|were sent to] {town} by {org}.
d: {num} boxes of {item} from {org} were sent to {town} on {date}.
b: {org} sent {num} boxes of {item} to {town} on {date}.
f: org num item town date
q: Who sent the goods? => {org}
q: How many boxes were sent? => {num}
q: What was sent? | What was in the boxes? => {item}
q: Where were the goods sent? => {town}
q: When were the goods sent? => {date}
= late!
d: They [arrived|came] {duration} late because of {delay}.
d: Because of {delay}, the delivery was {duration} late.
b: They arrived {duration} late because of {delay}.
f: duration delay
q: How late was the delivery? => {duration}
q: Why was the delivery late? => {delay}
= damage!
d: {num2} boxes were damaged.
d: On opening, {num2} boxes [proved|turned out] to be damaged.
b: {num2} boxes were damaged.
f: num2
q: How many boxes were damaged? => {num2}
= receive!
d: {person} signed for the goods.
d: The goods were received by {person}.
b: {person} received them.
f: person
q: Who received the goods? | Who signed for the goods? => {person}
= pay!
d: The invoice over {money} is due on {date2}.
d: Please pay {money} by {date2}.
b: {money} is due on {date2}.
f: money date2
q: How much must be paid? | What is the amount of the invoice? => {money}
q: When is the payment due? => {date2}
= number
d: The order number is {code2}.
d: Please quote {code2} in all letters.
q: What is the order number? => {code2}
x: The driver was friendly.
x: The ramp at {spot} is free again.
x: The boxes were stacked on {num3} pallets.
x: The warehouse closes at {time}.
x: Empty pallets can be returned.

KIND complaint
title: Customer complaint | Complaint {code} | Call note | Customer service note
= call!
d: {person} from {town} [called|wrote] on {date} about {product}.
d: On {date}, {person} from {town} complained about {product}.
d: A complaint about {product} came from {person} in {town} on {date}.
b: {person} from {town} complained about {product} on {date}.
f: person town product date
q: Who complained? | Who is the customer? => {person}
q: Where does the customer live? => {town}
q: What is the complaint about? | Which product is it? => {product}
q: When did the customer complain? => {date}
= problem!
d: The customer says that {defect}.
d: According to the customer, {defect}.
d: The trouble is that {defect}.
b: The customer says that {defect}.
f: defect
q: What is the problem? | What does the customer say? => {defect}
= bought!
d: It was bought in {month} for {money}.
d: The price in {month} was {money}.
b: It was bought in {month} for {money}.
f: month money
q: When was it bought? => {month}
q: How much did it cost? | What was the price? => {money}
= wish!
d: The customer wants {remedy}.
d: {person.last} asks for {remedy}.
b: The customer wants {remedy}.
f: remedy
q: What does the customer want? => {remedy}
= next!
d: {person2} will answer by {date2}.
d: An answer by {person2} is promised for {date2}.
b: {person2} will answer by {date2}.
f: person2 date2
q: Who will answer? => {person2}
q: By when will there be an answer? => {date2}
x: The customer stayed polite.
x: The receipt is at hand.
x: Similar cases: {num3} this year.
x: The line was noisy.
x: The customer has bought from us before.

KIND request
form: mail
= ask!
d: [Could you|Would you|Can you please] {action} by {date}?
d: Please {action} by {date}.
d: I need you to {action} by {date}.
b: {sender} asks {reader} to {action} by {date}.
f: sender reader action date
q: What is asked for? | What does the sender ask for? => {action}
q: By when should it be done? | What is the deadline? => {date}
q: Who wrote the message? | Who sent this? => {sender}
q: Who is asked? => {reader}
= why!
d: The reason is {need}.
d: We need it because of {need}.
d: It is urgent because of {need}.
b: The reason is {need}.
f: need
q: What is the reason? | Why is it needed? => {need}
= pay!
d: You may spend up to {money}.
d: The budget for it is {money}.
b: The budget is {money}.
f: money
q: How much may be spent? | What is the budget? => {money}
= help!
d: {person} can help you.
d: If you need help, ask {person}.
d: {person} knows the details.
b: {person} can help.
f: person
q: Who can help? => {person}
= papers
d: The papers are in {room}.
d: You find the papers in {room}, under {code}.
q: Where are the papers? => {room}
x: I hope you had a good weekend.
x: The office was quiet today.
x: I am away on {weekday}.
x: Greetings from the whole team.
x: By the way, {person3} has moved to the second floor.

KIND move
form: mail
= shift!
d: Our meeting about {topic} [moves|has to move] from {weekday} to {date} at {time}.
d: I must move our meeting about {topic} from {weekday} to {date} at {time}.
d: The meeting about {topic} will not be on {weekday} but on {date} at {time}.
b: {sender} moves the meeting about {topic} from {weekday} to {date} at {time}.
f: sender topic weekday date time
q: What is the meeting about? => {topic}
q: When is the meeting now? | On what date is the new meeting? => {date}
q: At what time is the meeting? => {time}
q: Who moved the meeting? | Who wrote the message? => {sender}
q: When was the meeting planned before? => {weekday}
= why!
d: The reason is {reason}.
d: I am sorry, but {reason} came up.
d: This is because of {reason}.
b: The reason is {reason}.
f: reason
q: What is the reason? | Why was the meeting moved? => {reason}
= where!
d: We meet in {room}.
d: The place is {room}.
b: It will be in {room}.
f: room
q: Where is the meeting? => {room}
= bring!
d: Please bring {deliverable}.
d: {person} will bring {deliverable}.
d: We should look at {deliverable}.
b: They should bring {deliverable}.
f: deliverable
q: What should be brought? => {deliverable}
= ok
d: Please tell {person2} if that does not suit you.
d: Let {person2} know if you cannot come.
q: Whom should one tell? => {person2}
x: It will not take long.
x: I will order sandwiches.
x: The lift is working again.
x: Parking is easier in the afternoon.
x: Thank you for your patience.

KIND trip
form: mail
= travel!
d: I [travel|am travelling|will travel] to {town} on {date} to {tripaim}.
d: On {date} I go to {town} to {tripaim}.
d: My trip to {town} is on {date}: I want to {tripaim}.
b: {sender} travels to {town} on {date} to {tripaim}.
f: sender town date tripaim
q: Who travels? | Who wrote the message? => {sender}
q: Where does the trip go? => {town}
q: When is the trip? => {date}
q: What is the purpose of the trip? => {tripaim}
= train!
d: My train leaves at {time} and the ticket cost {money}.
d: The ticket for the train at {time} cost {money}.
b: The train leaves at {time} and cost {money}.
f: time money
q: When does the train leave? => {time}
q: How much was the ticket? => {money}
= stay!
d: I stay at {hotel} for {stay}.
d: For {stay} I will be at {hotel}.
b: The stay is {stay} at {hotel}.
f: stay hotel
q: Where does the sender stay? | Which hotel is it? => {hotel}
q: How long is the stay? => {stay}
= cover!
d: {person} will take my calls.
d: While I am away, {person} stands in for me.
d: Please turn to {person} while I am away.
b: {person} stands in.
f: person
q: Who stands in? | Who takes the calls? => {person}
= back!
d: I am back on {date2}.
d: I return on {date2}.
b: The return is on {date2}.
f: date2
q: When is the return? | When does the sender come back? => {date2}
x: I look forward to it.
x: The forecast is fine.
x: I have not been there since {year}.
x: My phone number has not changed.
x: Please keep the plants watered.

KIND chat
form: message
= news!
d: {person} [told me|says|wrote] that {gossip} on {weekday}.
d: Did you hear that {gossip} on {weekday}? {person} [told me|says so].
d: News from {person}: {gossip} on {weekday}.
b: {person} says that {gossip} on {weekday}.
f: person gossip weekday
q: Who told the news? => {person}
q: What is the news? => {gossip}
q: On which day is it? => {weekday}
= place!
d: It is at {spot} in {town}.
d: The place is {spot} in {town}.
b: It is at {spot} in {town}.
f: spot town
q: In which town is it? => {town}
q: Where is it exactly? => {spot}
= bring!
d: I will bring {food} and you could bring {food2}.
d: Could you bring {food2}? I have {food}.
b: {sender} brings {food}, {reader} could bring {food2}.
f: sender food reader food2
q: What does {sender} bring? => {food}
q: What should {reader} bring? => {food2}
= meet!
d: Let us meet at {time}.
d: I will pick you up at {time}.
d: Be there at {time}, please.
b: They meet at {time}.
f: time
q: At what time do they meet? => {time}
= money!
d: You still owe me {money} for {thing}.
d: {thing} cost {money}, we can share it.
b: {thing} cost {money}.
f: money thing
q: How much money is it? => {money}
q: What was the money for? => {thing}
x: How are you?
x: I slept badly.
x: The cat is fine again.
x: It rained all day here.
x: {person3} sends greetings.
x: I must run now.
"""

"""Document kinds of the working world, in the notation of `grammar.parse_kinds`."""

KINDS = """
KIND inspection
title: Site inspection report | Inspection of {site} | Inspection note | Report on {site}
= visit!
d: {person} inspected {site} on {date}.
d: On {date}, {person} [carried out|made] an inspection of {site}.
d: {site} was [inspected|visited] by {person} on {date}.
b: {person} inspected {site} on {date}.
f: person site date
q: Who inspected the site? | Who carried out the inspection? => {person}
q: When was the inspection? | On what date was the site inspected? => {date}
q: Which site was inspected? | What was inspected? => {site}
= finding!
d: The main finding was {fault} [near|beside|next to] {spot}.
d: {person.last} found {fault} [near|beside] {spot}.
d: Near {spot}, the inspector [noticed|discovered] {fault}.
b: {fault} was found near {spot}.
f: fault spot
q: What was found? | What was the main finding? => {fault}
q: Where was the problem found? => {spot}
= cost!
d: The repair is [estimated|expected] to cost {money}.
d: [Putting this right|Fixing it] will cost about {money}.
d: An estimate of {money} was given for the repair.
b: The repair should cost {money}.
f: money
q: How much will the repair cost? | What is the estimate for the repair? => {money}
= next!
d: {org} has been asked to {action} by {date2}.
d: By {date2}, {org} should {action}.
d: As a next step, {org} will {action} before {date2}.
b: {org} will {action} by {date2}.
f: org action date2
q: Who will do the work? | Which company was asked to act? => {org}
q: What is the next step? | What should be done? => {action}
q: What is the deadline? | By when should it be done? => {date2}
= signs
d: [Fire extinguishers|Emergency lights|Safety signs] were [checked|counted] and all {num} were in order.
d: All {num} [extinguishers|emergency lamps|exit signs] passed the check.
q: How many safety devices were checked? => {num}
= staff
d: {person2} [showed the inspector around|opened the rooms|was present throughout].
q: Who accompanied the inspector? | Who showed the inspector around? => {person2}
x: The previous visit, by {person3}, had found nothing of note.
x: Access was easy and the paperwork was ready.
x: The floor in {spot2} had been cleaned the day before.
x: Photographs are stored in folder {code}.
x: The car park was half empty during the visit.

KIND outage
title: Incident report | Outage of {system} | Post-incident note | Service interruption
= start!
d: On {date} at {time}, {system} [stopped responding|went down|failed].
d: {system} [became unavailable|went down|stopped working] at {time} on {date}.
d: At {time} on {date} users [lost access to|could no longer reach] {system}.
b: {system} failed on {date} at {time}.
f: system date time
q: When did the outage begin? | At what time did it fail? => {time}
q: Which system failed? | What went down? => {system}
q: On what date was the outage? => {date}
= cause!
d: The cause was {itfault}.
d: The problem was traced to {itfault}.
d: It turned out that {itfault} was [behind it|to blame|the cause].
b: The cause was {itfault}.
f: itfault
q: What was the cause? | What caused the outage? => {itfault}
= impact!
d: About {num} [users|customers] were affected for {duration}.
d: For {duration}, {num} [people|users] could not work.
d: The interruption lasted {duration} and touched {num} [users|accounts].
b: {num} users were affected for {duration}.
f: num duration
q: How many users were affected? => {num}
q: How long did it last? | How long was the interruption? => {duration}
= fix!
d: {person} solved the problem by [an emergency change|a change]: {itfix}.
d: {person} [fixed|solved] it with {itfix}.
d: The service came back after {itfix} by {person}.
b: {person} fixed it with {itfix}.
f: person itfix
q: Who fixed it? | Who solved the problem? => {person}
q: How was it fixed? => {itfix}
= follow!
d: To prevent a repeat, the team will {itaction} by {date2}.
d: The team agreed to {itaction} before {date2}.
d: As a follow-up, the team must {itaction} by {date2}.
b: The team will {itaction} by {date2}.
f: itaction date2
q: What will the team do? | What is the follow-up? => {itaction}
q: By when will the follow-up be done? => {date2}
= ticket
d: The ticket number is {code}.
d: Details are recorded [under|in] {code}.
q: What is the ticket number? => {code}
x: No data was lost.
x: A similar alarm in {month} had turned out to be harmless.
x: The help desk answered {num3} calls that week.
x: {person3} was on call but was not needed.
x: The status page was updated every half hour.

KIND accident
title: Safety report | Accident note | Report of an accident at {site}
= event!
d: On {date}, {person}, a {role}, {injury} at {site}.
d: {person}, who works as a {role}, {injury} at {site} on {date}.
d: An accident happened at {site} on {date}: {person}, a {role}, {injury}.
b: {person}, a {role}, {injury} at {site} on {date}.
f: person role injury site date
q: Who was hurt? | Who had the accident? => {person}
q: Where did the accident happen? => {site}
q: When did the accident happen? => {date}
q: What is the injured person's job? => {role}
= cause!
d: The reason was {hazard}.
d: Investigators [named|found] {hazard} as the cause.
d: It was caused by {hazard}.
b: It was caused by {hazard}.
f: hazard
q: What was the cause? | What caused the accident? => {hazard}
= care!
d: {person2} gave first aid and called [an ambulance|a doctor].
d: First aid was given by {person2}.
d: {person2} was the first to help.
b: {person2} gave first aid.
f: person2
q: Who gave first aid? | Who helped first? => {person2}
= leave!
d: The injured worker will be away for {duration}.
d: A doctor ordered {duration} of rest.
b: The injured worker will be away for {duration}.
f: duration
q: How long will the worker be away? => {duration}
= measure!
d: From {date2}, staff must {safety}.
d: A new rule says that everybody has to {safety} from {date2}.
d: The site manager decided that staff must {safety} starting {date2}.
b: From {date2}, staff must {safety}.
f: safety date2
q: What is the new rule? | What must staff do? => {safety}
q: From when does the rule apply? => {date2}
x: The area was closed off for the rest of the day.
x: There were {num3} minor cases last year.
x: Two colleagues saw what happened.
x: The weather was dry and the light was good.
x: {person3} wrote down the statements.

KIND project
title: Project status: {project} | Status update | {project} update | Weekly status of {project}
= state!
d: {project} is {state}, [reports|says] {person}.
d: {person} reports that {project} is {state}.
d: According to {person}, {project} is {state}.
b: {project} is {state}, says {person}.
f: project state person
q: What is the state of the project? | How is the project doing? => {state}
q: Who reports on the project? => {person}
q: Which project is it? | What is the project called? => {project}
= done!
d: This week the team finished {deliverable}.
d: The team has [completed|delivered] {deliverable}.
d: {deliverable} is now [done|complete].
b: The team finished {deliverable}.
f: deliverable
q: What was finished? | What did the team finish? => {deliverable}
= risk!
d: The [main|biggest] risk is {risk}.
d: {risk} [remains|is] the biggest risk.
d: The team worries about {risk}.
b: The main risk is {risk}.
f: risk
q: What is the main risk? | What does the team worry about? => {risk}
= budget!
d: So far {money} of the budget of {money2} has been spent.
d: Spending stands at {money} out of {money2}.
d: Of the {money2} approved, {money} is used.
b: {money} of {money2} has been spent.
f: money money2
q: How much has been spent? => {money}
q: What is the budget? | How large is the total budget? => {money2}
= next!
d: The next milestone, {deliverable2}, is due on {date}.
d: {deliverable2} is due on {date}.
d: Next comes {deliverable2}, due on {date}.
b: {deliverable2} is due on {date}.
f: deliverable2 date
q: What is the next milestone? | What comes next? => {deliverable2}
q: When is the next milestone due? => {date}
= team
d: {person2} joined the team as {role}.
d: The team welcomed {person2}, the new {role}.
q: Who joined the team? => {person2}
x: The weekly call was short.
x: {person3} is back from holiday.
x: The team counts {num3} people at the moment.
x: Feedback from the first workshop was friendly.
x: The plan is kept in document {code}.

KIND sales
title: Sales report | {month} sales | Sales of {month} | Monthly sales note
= total!
d: Sales in {town} [reached|came to|rose to] {money} in {month}.
d: In {month}, the {town} branch sold goods worth {money}.
d: The {town} branch reports sales of {money} for {month}.
b: The {town} branch sold {money} in {month}.
f: town money month
q: How much was sold? | What were the sales? => {money}
q: Which branch is reported on? | Which town is the branch in? => {town}
q: Which month does the report cover? => {month}
= change!
d: That is {percent} [more|higher] than a year ago.
d: Compared with last year this is a rise of {percent}.
b: That is {percent} more than a year ago.
f: percent
q: By how much did sales rise? => {percent}
= drop!
d: That is {percent} [less|lower] than a year ago.
d: Compared with last year this is a fall of {percent}.
b: That is {percent} less than a year ago.
f: percent
q: By how much did sales fall? => {percent}
= best!
d: The best seller was {item}, with {num} [units|orders].
d: {item} sold best, with {num} units.
d: Most in demand [was|were] {item}: {num} units went out.
b: The best seller was {item} with {num} units.
f: item num
q: What sold best? | What was the best seller? => {item}
q: How many units of the best seller were sold? => {num}
= why!
d: {person}, who leads the branch, [puts it down to|explains it by|credits] {salesreason}.
d: The reason, says branch manager {person}, is {salesreason}.
b: {person} explains it by {salesreason}.
f: person salesreason
q: Who leads the branch? | Who explains the result? => {person}
q: What is the reason for the result? | How is the result explained? => {salesreason}
= plan!
d: For {month2} the branch plans {salesplan}.
d: In {month2}, {salesplan} will follow.
b: The branch plans {salesplan} for {month2}.
f: salesplan month2
q: What does the branch plan? => {salesplan}
x: The shop was open on {num3} days.
x: Returns stayed at the usual level.
x: {item2} sold about as before.
x: Stock was counted on {date3}.
x: A new till was installed at the entrance.

KIND maintenance
title: Maintenance log | Work order {code} | Service note | Maintenance of {machine}
= work!
d: {person} serviced {machine} at {site} on {date}.
d: On {date}, {person} [repaired|serviced] {machine} at {site}.
d: {machine} at {site} was serviced by {person} on {date}.
b: {person} serviced {machine} at {site} on {date}.
f: person machine site date
q: Who did the work? | Who serviced the machine? => {person}
q: Which machine was serviced? => {machine}
q: When was the service? => {date}
q: Where is the machine? => {site}
= fault!
d: The [technician|mechanic] found {fault}.
d: The trouble came from {fault}.
d: During the check {fault} came to light.
b: The technician found {fault}.
f: fault
q: What did the technician find? | What was wrong? => {fault}
= parts!
d: [Replacing it|The new parts] cost {money} and took {duration}.
d: The repair took {duration} and cost {money}.
b: The repair took {duration} and cost {money}.
f: duration money
q: How long did the repair take? => {duration}
q: How much did the repair cost? => {money}
= next!
d: The next service is due on {date2}.
d: {machine} must be serviced again by {date2}.
d: Please plan the next service for {date2}.
b: The next service is due on {date2}.
f: date2
q: When is the next service? | When is the next service due? => {date2}
= reading
d: The counter showed {num} hours.
d: At the time of the visit the counter stood at {num} hours.
q: What did the counter show? => {num} hours
= advice!
d: {person.last} advises to {action}.
d: The technician recommends to {action}.
b: {person.last} advises to {action}.
f: action
q: What does the technician advise? | What is recommended? => {action}
x: Oil and filters were in good condition.
x: The noise reported in {month} could not be heard.
x: The key was returned to {person3}.
x: A spare {part} is kept in the store.
x: The machine was stopped during the lunch break.

KIND minutes
title: Minutes of the meeting | Meeting notes: {topic} | Notes from the {dept} meeting | Minutes
= meet!
d: The {dept} team met on {date} to discuss {topic}.
d: On {date} the {dept} team discussed {topic}.
d: A meeting of the {dept} team about {topic} took place on {date}.
b: The {dept} team met on {date} about {topic}.
f: dept date topic
q: Which team met? => {dept}
q: When was the meeting? => {date}
q: What was the meeting about? | What was discussed? => {topic}
= chair
d: {person2} chaired the meeting and {person3} took the minutes.
d: In the chair: {person2}. Minutes: {person3}.
q: Who chaired the meeting? => {person2}
q: Who took the minutes? => {person3}
= decision!
d: It was decided to {action}.
d: The group agreed to {action}.
d: After a [short|long|lively] debate the team decided to {action}.
b: It was decided to {action}.
f: action
q: What was decided? | What did the team decide? => {action}
= task!
d: {person} will {action2} by {date2}.
d: {person} took on the task to {action2} by {date2}.
d: By {date2}, {person} is to {action2}.
b: {person} will {action2} by {date2}.
f: person action2 date2
q: Who has a task? | Who took on a task? => {person}
q: By when must the task be done? => {date2}
= money!
d: A sum of {money} was set aside for this.
d: The team approved {money} for it.
b: {money} was approved.
f: money
q: How much was approved? | Which sum was set aside? => {money}
= nextmeet!
d: The next meeting is on {date3} at {time}.
d: The team meets again on {date3} at {time}.
b: The next meeting is on {date3} at {time}.
f: date3 time
q: When is the next meeting? | On what date is the next meeting? => {date3}
q: At what time is the next meeting? => {time}
x: Apologies were received from {person4}.
x: The minutes of the last meeting were accepted.
x: Coffee was served in {room}.
x: {num3} people took part.
x: A question about parking was left open.

KIND budget
title: Budget note | Finance memo | Note on the {dept} budget
= ask!
d: The {dept} department [asks for|requests|needs] {money} for {purchase}.
d: {money} is requested by the {dept} department for {purchase}.
d: For {purchase}, the {dept} department requests {money}.
b: The {dept} department requests {money} for {purchase}.
f: dept money purchase
q: Which department asks for money? | Who requests the money? => {dept}
q: How much is requested? | How much money is needed? => {money}
q: What is the money for? => {purchase}
= offers!
d: {org} made the cheapest offer, {money2}.
d: The lowest of {num3} offers came from {org}, at {money2}.
b: The cheapest offer came from {org} at {money2}.
f: org money2
q: Who made the cheapest offer? => {org}
q: How much was the cheapest offer? => {money2}
= reason!
d: The reason given is {fault} in {spot}.
d: {dept} points to {fault} in {spot}.
b: The reason is {fault} in {spot}.
f: fault spot
q: What reason is given? => {fault}
= decide!
d: {person}, the {role}, will decide on {date}.
d: A decision by {person}, the {role}, is expected on {date}.
b: {person}, the {role}, will decide on {date}.
f: person role date
q: Who will decide? => {person}
q: When will the decision be made? => {date}
= left!
d: After this, {money3} would remain in the budget.
d: That would leave {money3} for the rest of the year.
b: {money3} would remain.
f: money3
q: How much would remain? | How much would be left? => {money3}
x: Last year nothing was bought under this heading.
x: The form was filed as {code}.
x: {person3} checked the figures.
x: Prices include delivery.
x: The old equipment will be given away.

KIND staff
title: Staff notice | Personnel note | Welcome note | News from {dept}
= join!
d: {person} [joins|will join] the {dept} department as {role} on {date}.
d: On {date}, {person} starts as {role} in the {dept} department.
d: The {dept} department welcomes {person}, its new {role}, on {date}.
b: {person} joins the {dept} department as {role} on {date}.
f: person dept role date
q: Who joins? | Who is the new colleague? => {person}
q: What is the new colleague's job? | As what does the new colleague start? => {role}
q: Which department is it? => {dept}
q: When does the new colleague start? => {date}
= from!
d: {person.first} comes from {org}, after {years} there.
d: Before that, {person.last} worked at {org} for {years}.
b: {person.last} worked at {org} for {years}.
f: org years
q: Where did the new colleague work before? => {org}
q: How long was that? => {years}
= task!
d: The first task will be {duty}.
d: {person.first} will be in charge of {duty}.
d: {person.last} will look after {duty}.
b: {person.last} will look after {duty}.
f: duty
q: What will be the first task? | What will the new colleague look after? => {duty}
= replaces!
d: {person2}, who held the post before, retires after {years2}.
d: The post was held by {person2}, who leaves after {years2}.
b: The post was held by {person2} for {years2}.
f: person2 years2
q: Who held the post before? => {person2}
= desk
d: The new desk is in {room}, extension {num}.
d: You will find {person.first} in {room}.
q: Where is the new desk? | Where does the new colleague sit? => {room}
x: There will be cake at noon.
x: The team now counts {num3} people.
x: Please say hello when you pass by.
x: A badge has been ordered.
x: {person3} will help during the first days.
"""

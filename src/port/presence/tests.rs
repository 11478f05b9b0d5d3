//! Each rule of the state machine, by value: what happens at which second, and what the caller is told to do.

use super::*;

const PAUSE: Duration = Duration::from_secs(1);
const THERE: Event = Event::Told { gone: false, input: false };
const INPUT: Event = Event::Told { gone: false, input: true };
const AWAY: Event = Event::Told { gone: true, input: false };
const LAST_WORDS: Event = Event::Told { gone: true, input: true };

fn at(milliseconds: u64) -> Duration {
    Duration::from_millis(100_000 + milliseconds)
}

/// Takes events, each with its time in milliseconds, and returns the actions.
fn play(presence: &mut Presence, events: &[(u64, Event)]) -> Vec<Action> {
    events.iter().filter_map(|&(time, event)| presence.on(at(time), event)).collect()
}

fn new(kind: Kind) -> Presence {
    Presence::new(kind, PAUSE)
}

fn connected() -> Presence {
    let mut presence = new(Kind::Socket);
    assert!(presence.may_accept());
    assert_eq!(play(&mut presence, &[(0, Event::Accepted)]), [Action::Begin]);
    assert!(!presence.may_accept());
    presence
}

#[test]
fn a_connection_ends_when_all_that_its_host_sent_has_been_read() {
    for ends in [LAST_WORDS, AWAY, Event::Gone] {
        let mut presence = connected();
        assert_eq!(play(&mut presence, &[(1, INPUT), (1, ends), (2, Event::Bytes)]), []);
        assert!(presence.is_leaving() && !presence.may_accept());
        assert_eq!(play(&mut presence, &[(3, Event::ReadAll), (3, Event::ReadAll)]), [Action::Left]);
        assert!(presence.may_accept() && !presence.is_leaving());
    }
    assert_eq!(play(&mut connected(), &[(1, Event::ReadAll)]), [], "a host that stays has not left");
}

#[test]
fn accept_is_tried_when_an_event_or_the_time_says_so() {
    let mut presence = new(Kind::Socket);
    play(&mut presence, &[(0, Event::NoCaller)]);
    assert!(!presence.may_accept() && presence.deadline().is_none());
    play(&mut presence, &[(5, INPUT)]);
    assert!(presence.may_accept());
    play(&mut presence, &[(5, Event::NotAccepted), (6, INPUT), (50, Event::Tick)]);
    assert!(!presence.may_accept(), "the kernel has no more memory than before");
    assert_eq!(presence.deadline(), Some(at(105)));
    play(&mut presence, &[(105, Event::Tick)]);
    assert!(presence.may_accept());
}

#[test]
fn a_device_reports_each_host_that_leaves_once() {
    let mut presence = new(Kind::Device);
    for round in (0..3).map(|round| 10 * round) {
        assert_eq!(play(&mut presence, &[(round, THERE), (round, INPUT), (round + 1, LAST_WORDS)]), []);
        assert!(presence.is_leaving());
        let more = [(round + 2, AWAY), (round + 3, Event::Gone), (round + 4, Event::ReadAll)];
        assert_eq!(play(&mut presence, &more), [Action::Left]);
        assert!(!presence.is_leaving());
        // It stays away, and bytes of the next host may come before the report of it.
        let more = [(round + 5, AWAY), (round + 6, LAST_WORDS), (round + 6, Event::Bytes), (round + 7, AWAY)];
        assert_eq!(play(&mut presence, &more), []);
        assert!(!presence.is_leaving());
    }
}

#[test]
fn a_device_whose_next_host_comes_while_the_last_words_are_read_reports_that_one_too() {
    let mut presence = new(Kind::Device);
    assert_eq!(play(&mut presence, &[(0, AWAY), (1, THERE), (2, Event::ReadAll)]), [Action::Left]);
    assert_eq!(play(&mut presence, &[(3, AWAY), (4, Event::ReadAll)]), [Action::Left]);
}

#[test]
fn the_first_report_after_a_greeting_is_about_the_host_before() {
    let mut presence = new(Kind::Device);
    let events = [(0, Event::Greeted), (900, AWAY), (901, Event::ReadAll)];
    assert_eq!(play(&mut presence, &events), [Action::EarlierLeft]);
    assert!(!presence.is_leaving());
    // The port goes on to say that no host is there until it has heard of the next one.
    assert_eq!(play(&mut presence, &[(905, LAST_WORDS), (906, Event::ReadAll), (910, THERE)]), []);
    assert_eq!(play(&mut presence, &[(950, AWAY), (951, Event::ReadAll)]), [Action::Left]);
}

#[test]
fn a_report_long_after_a_greeting_is_about_the_host_that_greeted() {
    let mut presence = new(Kind::Device);
    assert_eq!(
        play(&mut presence, &[(0, Event::Greeted), (1000, AWAY), (1001, Event::ReadAll)]),
        [Action::Left]
    );
}

#[test]
fn a_report_before_a_greeting_is_not_late() {
    let mut presence = new(Kind::Device);
    // The greeting stands among what could still be read when the earlier host was reported gone.
    assert_eq!(play(&mut presence, &[(0, LAST_WORDS), (1, Event::Greeted), (2, Event::ReadAll)]), []);
    assert!(!presence.is_leaving());
    assert_eq!(play(&mut presence, &[(3, THERE), (500, AWAY), (501, Event::ReadAll)]), [Action::Left]);
}

#[test]
fn a_violation_ends_a_connection() {
    let mut presence = connected();
    assert_eq!(play(&mut presence, &[(0, Event::Violation)]), [Action::HangUp]);
    assert!(presence.may_accept());
    assert_eq!(play(&mut presence, &[(1, Event::Accepted)]), [Action::Begin]);
    assert_eq!(presence.hearing(), Hearing::Frames);
}

#[test]
fn a_violation_makes_a_device_deaf_until_its_host_leaves() {
    let mut presence = new(Kind::Device);
    assert_eq!(play(&mut presence, &[(0, Event::Violation), (1, Event::Nothing), (99_000, Event::Tick)]), []);
    assert_eq!((presence.hearing(), presence.deadline()), (Hearing::Deaf, None));
    assert_eq!(play(&mut presence, &[(99_001, AWAY), (99_002, Event::ReadAll)]), [Action::Left]);
    assert_eq!(presence.hearing(), Hearing::Frames);
    // Also by a report that may be about an earlier host.
    let events = [(99_003, THERE), (99_004, Event::Greeted), (99_005, Event::Violation), (99_006, AWAY)];
    assert_eq!(play(&mut presence, &events), [Action::EarlierLeft]);
    assert_eq!(presence.hearing(), Hearing::Frames);
}

#[test]
fn a_violation_on_a_line_is_over_after_a_pause() {
    let mut presence = new(Kind::Line);
    assert_eq!(play(&mut presence, &[(0, Event::Violation), (500, Event::Nothing)]), []);
    assert_eq!((presence.hearing(), presence.deadline()), (Hearing::Lost, Some(at(1500))));
    // Nothing was heard, and then something was.
    assert_eq!(play(&mut presence, &[(1400, INPUT), (1500, Event::Tick), (1501, Event::Bytes)]), []);
    assert_eq!(presence.deadline(), None);
    assert_eq!(play(&mut presence, &[(1502, Event::Nothing), (2502, Event::Tick)]), [Action::Begin]);
    assert_eq!(presence.hearing(), Hearing::Guessed);
    assert!(presence.hears_frames());
}

#[test]
fn a_long_silence_on_a_line_begins_a_frame_once() {
    let mut presence = new(Kind::Line);
    assert_eq!(presence.deadline(), None, "nobody has listened");
    assert_eq!(play(&mut presence, &[(0, Event::Nothing), (5000, Event::Nothing), (9999, Event::Tick)]), []);
    assert_eq!(presence.deadline(), Some(at(10_000)));
    assert_eq!(play(&mut presence, &[(10_000, Event::Tick), (50_000, Event::Tick)]), [Action::Begin]);
    assert_eq!(presence.deadline(), None, "a guest without a host sleeps");
    assert_eq!(play(&mut presence, &[(60_000, INPUT), (60_000, Event::Bytes), (90_000, Event::Tick)]), []);
    assert_eq!(play(&mut presence, &[(90_001, Event::Nothing), (100_001, Event::Tick)]), [Action::Begin]);
}

/// The guest was held up, not the host: what has come ends the silence, whether or not it has been read.
#[test]
fn input_that_waits_ends_a_silence() {
    for kind in [Kind::Line, Kind::Device] {
        let mut presence = Presence::resumed(kind, PAUSE, Hearing::Lost);
        assert_eq!(play(&mut presence, &[(0, Event::Nothing), (20_000, INPUT), (20_000, Event::Tick)]), []);
        assert_eq!(presence.hearing(), Hearing::Lost);
    }
}

#[test]
fn elsewhere_a_silence_means_nothing() {
    for mut presence in [connected(), new(Kind::Device)] {
        assert_eq!(play(&mut presence, &[(0, Event::Nothing), (100_000, Event::Tick)]), []);
        assert_eq!(presence.deadline(), None);
    }
}

#[test]
fn a_successor_that_is_lost_guesses_by_a_pause_and_may_be_wrong() {
    for kind in [Kind::Socket, Kind::Device, Kind::Line] {
        let mut presence = Presence::resumed(kind, PAUSE, Hearing::Lost);
        assert!(!presence.may_accept() && !presence.hears_frames());
        assert_eq!(play(&mut presence, &[(0, Event::Nothing), (1000, Event::Tick)]), [Action::Begin]);
        // Frames make no sense: the guess was wrong, whatever the port.
        assert_eq!(play(&mut presence, &[(1100, Event::Bytes), (1100, Event::Violation)]), []);
        assert_eq!(presence.hearing(), Hearing::Lost);
        assert_eq!(play(&mut presence, &[(1101, Event::Nothing), (2101, Event::Tick)]), [Action::Begin]);
        // Each pause is told once.
        let pause = [(2200, Event::Bytes), (2201, Event::Nothing), (3201, Event::Tick), (3300, Event::Tick)];
        assert_eq!(play(&mut presence, &pause), [Action::Paused]);
        // What it is cannot be told yet, and the next pause is waited for.
        assert_eq!(play(&mut presence, &[(3300, Event::Unsure), (4300, Event::Tick)]), [Action::Paused]);
        let line = kind == Kind::Line;
        assert_eq!(presence.deadline(), line.then(|| at(13_300)));
        assert_eq!(play(&mut presence, &[(13_300, Event::Tick)]).len(), usize::from(line));
    }
}

#[test]
fn the_next_host_is_understood_without_a_guess() {
    for (kind, over) in [(Kind::Socket, Event::Accepted), (Kind::Device, Event::ReadAll)] {
        for hearing in [Hearing::Lost, Hearing::Guessed] {
            let mut presence = Presence::resumed(kind, PAUSE, hearing);
            assert_eq!(play(&mut presence, &[(0, AWAY), (1, Event::ReadAll), (2, over)]).len(), {
                if kind == Kind::Socket { 2 } else { 1 }
            });
            assert_eq!(presence.hearing(), Hearing::Frames);
        }
    }
}

/// Whatever happens in whatever order, a deadline that has passed is acted on by one tick: the loop never
/// spins.
#[test]
fn a_deadline_is_passed_once() {
    let events = [
        THERE,
        INPUT,
        AWAY,
        LAST_WORDS,
        Event::Accepted,
        Event::NoCaller,
        Event::NotAccepted,
        Event::Gone,
        Event::ReadAll,
        Event::Nothing,
        Event::Bytes,
        Event::Violation,
        Event::Greeted,
        Event::Unsure,
        Event::Tick,
    ];
    let mut number = 1_u32;
    let mut random = |below: usize| {
        number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        usize::try_from(number >> 8).unwrap() % below
    };
    for kind in [Kind::Socket, Kind::Device, Kind::Line] {
        for hearing in [Hearing::Frames, Hearing::Guessed, Hearing::Lost, Hearing::Deaf] {
            let mut presence = Presence::resumed(kind, PAUSE, hearing);
            let mut now = at(0);
            for _ in 0..20_000 {
                now += Duration::from_millis([0, 1, 99, 1000, 10_000][random(5)]);
                presence.on(now, Event::Tick);
                presence.on(now, Event::Tick);
                assert!(presence.deadline().is_none_or(|deadline| deadline > now), "{presence:?}");
                presence.on(now, events[random(events.len())]);
                assert!(!presence.may_accept() || kind == Kind::Socket);
            }
        }
    }
}

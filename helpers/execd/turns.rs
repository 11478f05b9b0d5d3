//! execd's loop. The container determines how long a start takes: the files that it reads are on a disk or a
//! share that may hang, and a process of the pod may stop it. So execd waits for all starts at once, and
//! answers each when it is ready, has failed or is late, in any order.

use std::time::Instant;

use hyperinit::fault::Fault;
use hyperinit::helper::{Asked, Replies, Requests};
use hyperinit::wire::Envelope;
use hyperinit::wire::execd::{Reply, Request};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::start::Becoming;
use super::{Execd, Outcome, report};

/// How many starts may be in progress. Each is a command of the host, and init accepts this many commands.
const STARTS_MAX: usize = 256;

/// A start that init waits for.
struct UnderWay {
    /// The number of the request.
    id: u64,
    start: report::Start,
    becoming: Becoming,
}

/// Answers requests until their channel ends. Fails if a reply cannot be sent.
pub fn serve(
    mut execd: Execd,
    mut requests: Requests<Request>,
    replies: Replies<Reply>,
) -> Result<(), Fault> {
    let mut starts: Vec<UnderWay> = Vec::new();
    loop {
        let asked = if starts.is_empty() {
            requests.next(&replies).map_or(Asked::Over, Asked::Request)
        } else {
            match wait(&requests, &starts) {
                Ok(Woken { request, starts: news }) => {
                    answer_starts(&mut execd, &mut starts, &news, &replies)?;
                    if request { requests.take(&replies)? } else { Asked::Nothing }
                }
                Err(fault) => {
                    give_up(&mut starts, &fault, &replies)?;
                    Asked::Nothing
                }
            }
        };
        match asked {
            Asked::Over => return Ok(()),
            Asked::Nothing => {}
            Asked::Request(request) => take(&mut execd, &mut starts, request, &replies)?,
        }
    }
}

/// Carries out a request, or begins the start that it asks for.
fn take(
    execd: &mut Execd,
    starts: &mut Vec<UnderWay>,
    Envelope { id, body }: Envelope<Request>,
    replies: &Replies<Reply>,
) -> Result<(), Fault> {
    let result = match execd.handle(body) {
        Ok(Outcome::Begun(start, _)) if starts.len() >= STARTS_MAX => {
            start.kill();
            Err(Fault::new("starting", "a process", "256 starts are under way"))
        }
        Ok(Outcome::Begun(start, becoming)) => {
            starts.push(UnderWay { id, start, becoming });
            return Ok(());
        }
        Ok(Outcome::Done) => Ok(Reply::Done),
        Err(fault) => Err(fault),
    };
    replies.send(id, result)
}

/// Kills all starts in progress and answers them with the fault: execd cannot wait for them.
fn give_up(starts: &mut Vec<UnderWay>, why: &Fault, replies: &Replies<Reply>) -> Result<(), Fault> {
    starts.drain(..).try_for_each(|UnderWay { id, start, .. }| {
        start.kill();
        replies.send(id, Err(why.clone()))
    })
}

/// The events that ended a wait.
struct Woken {
    /// A request may have come.
    request: bool,
    /// The news of each start, in the order of the starts.
    starts: Vec<News>,
}

/// What the process of a start has done: reported, or died.
#[derive(Clone, Copy)]
struct News {
    said: bool,
    died: bool,
}

/// Waits until a request may have come, or a start has news or is late.
fn wait(requests: &Requests<Request>, starts: &[UnderWay]) -> Result<Woken, Fault> {
    let watched = starts.iter().flat_map(|under_way| under_way.start.watched());
    let mut fds: Vec<PollFd<'_>> = [requests.watched()]
        .into_iter()
        .chain(watched)
        .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
        .collect();
    let timeout = match starts.iter().map(|under_way| under_way.start.until()).min() {
        _ if requests.has_read_more() => PollTimeout::ZERO,
        None => PollTimeout::NONE,
        Some(until) => {
            // Rounded up: a deadline that is not there yet must not spin.
            let left = until.saturating_duration_since(Instant::now()).as_millis() + 1;
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        }
    };
    match poll(&mut fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(Fault::errno("waiting for", "starts", errno)),
    }
    let woken: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or_default()).collect();
    let (request, starts) = woken.split_first().unwrap_or((&false, &[]));
    // In the order of `report::Start::watched`.
    let starts = starts.chunks_exact(2).map(|each| News { said: each[0], died: each[1] }).collect();
    Ok(Woken { request: *request || requests.has_read_more(), starts })
}

/// Answers the starts that are ready, have failed or are late.
fn answer_starts(
    execd: &mut Execd,
    starts: &mut Vec<UnderWay>,
    news: &[News],
    replies: &Replies<Reply>,
) -> Result<(), Fault> {
    let now = Instant::now();
    let mut waiting = Vec::with_capacity(starts.len());
    for (mut under_way, &News { said, died }) in std::mem::take(starts).into_iter().zip(news) {
        let looked = said || died || now >= under_way.start.until();
        let Some(outcome) = looked.then(|| under_way.start.look(died)).flatten() else {
            waiting.push(under_way);
            continue;
        };
        let UnderWay { id, start, becoming } = under_way;
        // Until init knows of the process, execd is responsible for ending it.
        let handed = outcome.and_then(|ready| execd.is_ready(becoming, ready).inspect_err(|_| start.kill()));
        let result = handed.map(|()| Reply::Started { pid: start.pid() });
        // When init receives the answer, execd holds no descriptor of the start any more.
        drop(start);
        replies.send(id, result)?;
    }
    *starts = waiting;
    Ok(())
}

//! A host's bytes on the stream port, in any portions: the frames do not depend on the portions, and a new
//! streamd continues wherever the old one stopped.
#![forbid(unsafe_code)]
#![no_main]

use hyperinit::frame::{STREAM_HEADER, STREAM_MAX, StreamDecoder, Violation};
use hyperinit_fuzz::{Choices, measure};
use libfuzzer_sys::fuzz_target;

#[path = "../../helpers/streamd/input.rs"]
#[allow(dead_code)]
mod input;

use input::Place;

type Frames = Result<Vec<(u64, Vec<u8>)>, Violation>;

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    let sizes = [0; 4].map(|_: u8| 1 + usize::from(choices.byte()));
    let bytes = choices.rest();
    let mut cut = 0;
    let portions = std::iter::from_fn(|| {
        cut += 1;
        Some(sizes[cut % sizes.len()])
    });
    let mut rest = bytes;
    let portions: Vec<&[u8]> = portions
        .map_while(|size| {
            let (portion, others) = rest.split_at(size.min(rest.len()));
            rest = others;
            (!portion.is_empty()).then_some(portion)
        })
        .collect();

    let whole = decode(&[bytes], &mut StreamDecoder::default());
    assert_eq!(decode(&portions, &mut StreamDecoder::default()), whole);
    let declared: usize = whole.iter().flatten().map(|(_, payload)| payload.len() + STREAM_HEADER).sum();
    assert!(declared <= bytes.len());

    let mut place = Place::default();
    let mut decoder = StreamDecoder::default();
    for (at, portion) in portions.iter().enumerate() {
        let passed = place.pass(portion);
        let (said, held) = measure(|| decode(&[portion], &mut decoder));
        assert!(held <= 3 * (STREAM_MAX.min(bytes.len()) + portion.len()) + 4096, "{held} bytes");
        assert_eq!(passed, said.is_ok(), "of a length that is not one");
        if !passed {
            return;
        }
        let pending = decoder.pending();
        assert_eq!(place.half_header().len(), if place.rest() > 0 { 0 } else { pending });
        assert_eq!(Place::of_note(place.note()), Some(place));
        succeed(&place, &portions[at + 1..], &whole);
    }
});

/// A new streamd that knows only the place reads the last of all the frames.
fn succeed(place: &Place, portions: &[&[u8]], whole: &Frames) {
    let mut decoder = StreamDecoder::default();
    decoder.push(place.half_header());
    let mut skip = place.rest();
    let heard: Vec<&[u8]> = portions
        .iter()
        .map(|portion| {
            let skipped = skip.min(portion.len());
            skip -= skipped;
            &portion[skipped..]
        })
        .collect();
    match (decode(&heard, &mut decoder), whole) {
        (Ok(heard), Ok(all)) => assert!(all.ends_with(&heard)),
        (heard, all) => assert_eq!(heard.is_err(), all.is_err()),
    }
}

fn decode(portions: &[&[u8]], decoder: &mut StreamDecoder) -> Frames {
    let mut frames = Vec::new();
    for portion in portions {
        decoder.push(portion);
        while let Some(frame) = decoder.next_frame()? {
            frames.push((frame.tag, frame.payload.to_vec()));
        }
    }
    Ok(frames)
}

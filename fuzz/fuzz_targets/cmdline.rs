//! Any kernel command line: only hyperinit's words change anything, each bad one is a warning, and the last
//! good one counts.
#![forbid(unsafe_code)]
#![no_main]

use hyperinit::init::settings::{Settings, Transport};
use hyperinit::wire::Profile;
use libfuzzer_sys::fuzz_target;
use log::LevelFilter;

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let plain = Settings::from_args([]).expect("no argument is a fault");
    let mut settings = plain.clone();
    let warnings = settings.add_cmdline(&text);

    let mut expected = plain;
    let mut bad = 0;
    for word in text.split_ascii_whitespace() {
        match word.split('=').next().unwrap_or_default() {
            "hyper_log" => match LEVELS.iter().find(|(name, _)| value(word).eq_ignore_ascii_case(name)) {
                Some((_, level)) => expected.log = *level,
                None => bad += 1,
            },
            "hyper_profile" => match value(word) {
                "default" => expected.profile = Profile::Default,
                "privileged" => expected.profile = Profile::Privileged,
                _ => bad += 1,
            },
            "hyper_debug" => expected.debug_door = true,
            "hyper_modules" => expected.keep_modules = true,
            "hyper_use_serial" => expected.transport = Transport::Serial,
            "hyper_p9_xen" => expected.transport = Transport::Xen,
            _ => {}
        }
    }
    assert_eq!(settings, expected);
    assert_eq!(warnings.len(), bad);
});

const LEVELS: [(&str, LevelFilter); 6] = [
    ("off", LevelFilter::Off),
    ("error", LevelFilter::Error),
    ("warn", LevelFilter::Warn),
    ("info", LevelFilter::Info),
    ("debug", LevelFilter::Debug),
    ("trace", LevelFilter::Trace),
];

fn value(word: &str) -> &str {
    word.split_once('=').map_or("", |(_, value)| value)
}

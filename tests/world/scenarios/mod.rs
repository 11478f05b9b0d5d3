//! The scenarios. Their expected outputs are those of plain Linux: `make world` also runs each in a chroot.

pub mod builders;
pub mod databases;
pub mod files;
pub mod people;
pub mod servers;
pub mod traced;

use super::Scenario;
use super::root::Set;

/// Every scenario, by module: `for_all!(then)` hands the list to the macro `then!`.
macro_rules! for_all {
    ($then:ident) => {
        $then! {
            builders: a_c_program_is_built, #[ignore = "large: make world"] a_jdk_compiles_and_connects, git_keeps_a_repository,
                #[ignore = "large: make world"] node_installs_a_package, packages_come_and_go,
                python_has_temporary_files_and_processes;
            databases: postgresql_keeps_its_rows, redis_keeps_its_keys, sqlite_has_a_write_ahead_log;
            files: a_file_is_renamed_over_an_open_one, a_file_without_a_name_is_one, a_tarball_with_odd_names_comes_back,
                changes_are_told, everybodys_files_are_theirs, locks_keep_others_out, memory_is_shared_by_a_file;
            people: accounts_are_made, screen_keeps_a_session, su_and_sudo_change_the_user, tmux_keeps_a_session;
            servers: a_daemon_forks_twice, a_user_has_low_ports_and_ping, nginx_serves_and_reloads,
                #[ignore = "large: make world"] ssh_logs_in;
            traced: #[ignore = "large: make world"] gdb_stops_a_program, strace_sees_the_calls;
        }
    };
}
pub(crate) use for_all;

/// A scenario that needs the small root.
const fn core(user: &'static str, script: &'static str, says: &'static str) -> Scenario {
    Scenario { name: "", set: Set::Core, user, script, says }
}

/// A scenario that needs the large root.
const fn all(user: &'static str, script: &'static str, says: &'static str) -> Scenario {
    Scenario { name: "", set: Set::All, user, script, says }
}

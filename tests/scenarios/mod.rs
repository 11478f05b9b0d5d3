//! The scenarios: what a guest does, one function each. tests/pod runs each in a separate guest in
//! namespaces, tests/vm runs them all in one VM. A scenario gets a running pod (`Guest::start_pod`), and
//! removes its own containers.

pub mod crowd;
pub mod exec;
pub mod files;
pub mod life;
#[allow(dead_code, reason = "each test has its part")]
#[path = "../support/probe.rs"]
mod probe;
pub mod share;
pub mod storage;
pub mod streams;
pub mod terminal;
pub mod words;

/// Every scenario, by module: `for_all!(then)` hands the list to the macro `then!`.
macro_rules! for_all {
    ($then:ident) => {
        $then! {
            exec: a_container_may_not_what_it_has_no_business_with, a_process_starts_clean, a_terminal_is_one, a_workdir_is_made_at_the_first_start_only,
                an_inits_terminal_is_the_console, large_commands_arrive_whole, setuid_programs_work, the_environment_is_the_protocols,
                users_and_groups_are_the_containers;
            files: a_pod_shares_what_a_pod_shares, a_read_only_image_needs_no_mount_points, a_read_only_root_is_read_only,
                an_image_cannot_lead_out_of_itself, an_image_that_is_not_there_leaves_nothing, an_images_links_do_not_reach_devices,
                dev_is_private_and_small, names_resolve, nothing_of_the_guest_is_in_sight,
                proc_and_sys_are_masked_and_read_only, sysctls_are_the_pods_own, the_images_own_names_stay_in_it, the_init_layer_is_dockers,
                users_have_all_ports_and_ping;
            life: a_container_has_its_streams_and_its_status, a_duplicate_is_refused_and_the_live_one_untouched,
                a_second_pod_is_refused, every_status_arrives, fifty_containers_at_once, killcontainer_signals_the_init_alone, only_an_exited_container_is_removed,
                orphans_are_reaped, process_ids_are_a_containers_own, replies_wait_their_turn_and_a_kill_does_not,
                signals_reach_the_init_and_the_group, small_commands, strange_ids_come_back_as_they_were,
                the_end_of_its_init_ends_a_container, what_belongs_to_a_start_may_be_sent_behind_it,
                what_cannot_be_executed_says_why, what_is_not_there_cannot_be_signalled;
            storage: a_new_docker_volume_gets_what_the_image_has, files_are_read_and_written, large_files_go_both_ways,
                parts_of_the_share_are_bound, volumes_nest_and_come_before_the_pods_files, words_of_files_that_make_no_sense;
            streams: a_flood_starves_nobody, a_host_that_reads_late_gets_everything,
                a_process_that_does_not_read_holds_up_no_output, a_survivor_does_not_hold_up_the_end,
                a_stream_belongs_to_one_process, both_ways_at_once, eight_megabytes_out_and_in, sixty_four_at_once, stdin_ends_when_the_host_says_so,
                stdin_ends_once, stdout_and_stderr_are_apart;
            terminal: an_empty_frame_does_not_close_it, eight_megabytes_through_it, its_size_is_any,
                its_size_may_be_sent_behind_the_start;
            words: a_wrong_word_is_named, only_the_guest_says_that, unknown_words_are_overlooked, what_is_too_much_is_refused, what_means_nothing_is_overlooked;
        }
    };
}
pub(crate) use for_all;

/// The scenarios that need a share which is a full filesystem: `for_filesystems!(then)` hands the list to the
/// macro `then!`.
macro_rules! for_filesystems {
    ($then:ident) => {
        $then! {
            share: a_file_that_never_had_a_name, a_file_without_a_name_is_a_file, a_files_capabilities_are_its_programs, an_access_list_lets_in_whom_it_names,
                fifos_lead_from_one_process_to_another, sockets_are_files_that_connect,
                what_a_process_has_written_is_the_hosts_when_it_ends, what_the_host_changes_is_seen;
        }
    };
}
pub(crate) use for_filesystems;
